package capture

import (
	"errors"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nft sets the rules by nftables, in the table `inet troth`.
type nft struct{}

func nftTable() *nftables.Table {
	return &nftables.Table{Name: "troth", Family: nftables.TableFamilyINet}
}

func (nft) set() error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	// One batch: the kernel does all of it or nothing. A table that is added is
	// there to be deleted, whether it was there before or not.
	table := conn.AddTable(nftTable())
	conn.DelTable(table)
	conn.AddTable(table)
	add := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority int32, all ...[]expr.Any) {
		chain := conn.AddChain(&nftables.Chain{
			Name: name, Table: table, Type: kind, Hooknum: hook, Priority: nftables.ChainPriorityRef(nftables.ChainPriority(priority)),
		})
		for _, exprs := range all {
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: exprs})
		}
	}
	const raw, mangle, filter = -300, -150, 0
	add("wire", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, raw,
		match(notLoopback(), markIn(marks, marksMask), setMark(0)))
	add("zone", nftables.ChainTypeFilter, nftables.ChainHookOutput, raw)
	add("mark", nftables.ChainTypeRoute, nftables.ChainHookOutput, mangle,
		match(tcp(), isReply(), connectionMarkIs(connectionMark), setMark(replyMark)),
		match(tcp(), socketMarkIs(expr.CmpOpEq), setConnectionMark(connectionMark)))
	add("outbound", nftables.ChainTypeNAT, nftables.ChainHookOutput, natPriority,
		match(tcp(), opens(), socketMarkIs(expr.CmpOpNeq), toLocal(expr.CmpOpNeq), redirect(OutboundPort)))
	add("inbound", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, natPriority,
		match(notLoopback(), tcp(), opens(), toLocal(expr.CmpOpEq), toPort(expr.CmpOpNeq, ports()...), redirect(PlaintextPort)))
	add("guard_out", nftables.ChainTypeFilter, nftables.ChainHookOutput, filter,
		match(tcp(), opens(), socketMarkIs(expr.CmpOpNeq), toLocal(expr.CmpOpNeq), reset()))
	add("guard_in", nftables.ChainTypeFilter, nftables.ChainHookInput, filter,
		match(notLoopback(), tcp(), opens(), toPort(expr.CmpOpEq, HBONEPort), accept()),
		match(notLoopback(), tcp(), opens(), toPort(expr.CmpOpEq, CallerFirstPort), accept()),
		match(notLoopback(), tcp(), opens(), toPort(expr.CmpOpEq, PlaintextPort), redirected(), accept()),
		match(notLoopback(), tcp(), opens(), reset()))
	if err := conn.Flush(); err != nil {
		return err
	}
	return setZone()
}

func (nft) remove() error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	conn.DelTable(conn.AddTable(nftTable()))
	return conn.Flush()
}

func (nft) dump() (string, error) {
	conn, err := nftables.New()
	if err != nil {
		return "", err
	}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return "", fmt.Errorf("list chains: %w", err)
	}
	var dump strings.Builder
	for _, chain := range chains {
		if chain.Table.Name != nftTable().Name {
			continue
		}
		fmt.Fprintf(&dump, "chain %s", chain.Name)
		if chain.Hooknum != nil && chain.Priority != nil {
			fmt.Fprintf(&dump, " %s %d %d", chain.Type, *chain.Hooknum, *chain.Priority)
		}
		dump.WriteByte('\n')
	}
	if dump.Len() == 0 {
		return "", errors.New("table inet troth is missing")
	}
	all, err := nftRules()
	if err != nil {
		return "", fmt.Errorf("list rules: %w", err)
	}
	for _, rule := range all {
		dump.WriteString(rule)
		dump.WriteByte('\n')
	}
	return dump.String(), nil
}

// nftRules returns the chain and the expressions of each of our rules, as the kernel
// sends them: package nftables cannot read what setZone adds.
func nftRules() ([]string, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	table, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_RULE_TABLE, Data: []byte(nftTable().Name + "\x00")}})
	if err != nil {
		return nil, err
	}
	messages, err := conn.Execute(netlink.Message{
		Header: netlink.Header{
			Type:  unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE,
			Flags: netlink.Request | netlink.Dump,
		},
		Data: append(nfgenmsg(byte(nftables.TableFamilyINet), 0), table...),
	})
	if err != nil {
		return nil, err
	}
	var all []string
	for _, message := range messages {
		if len(message.Data) < len(nfgenmsg(0, 0)) {
			return nil, errors.New("the kernel sent half a message")
		}
		attributes, err := netlink.UnmarshalAttributes(message.Data[len(nfgenmsg(0, 0)):])
		if err != nil {
			return nil, err
		}
		var chain, exprs string
		for _, a := range attributes {
			switch a.Type &^ (netlink.Nested | netlink.NetByteOrder) {
			case unix.NFTA_RULE_TABLE:
				if strings.TrimRight(string(a.Data), "\x00") != nftTable().Name {
					return nil, errors.New("the kernel sent the rules of another table")
				}
			case unix.NFTA_RULE_CHAIN:
				chain = strings.TrimRight(string(a.Data), "\x00")
			case unix.NFTA_RULE_EXPRESSIONS:
				exprs = fmt.Sprintf("%x", a.Data)
			}
		}
		all = append(all, chain+" "+exprs)
	}
	return all, nil
}

// setZone adds the one rule that package nftables cannot say: that a connection has a
// zone in one direction only.
//
// It is a batch of its own. Between the two, and if the process dies there, the
// agent's own connections are in everybody's zone: one of tens of thousands then
// fails, that takes the port which its caller has. The next Open mends that.
func setZone() error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	defer conn.Close()

	var exprs []netlink.Attribute
	for _, e := range match(socketMarkIs(expr.CmpOpEq),
		[]expr.Any{&expr.Immediate{Register: 1, Data: binaryutil.NativeEndian.PutUint16(zone)}}) {
		b, err := expr.Marshal(byte(nftables.TableFamilyINet), e)
		if err != nil {
			return err
		}
		exprs = append(exprs, netlink.Attribute{Type: netlink.Nested | unix.NFTA_LIST_ELEM, Data: b})
	}
	const original = 0 // IP_CT_DIR_ORIGINAL
	ct, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_CT_KEY, Data: binaryutil.BigEndian.PutUint32(unix.NFT_CT_ZONE)},
		{Type: unix.NFTA_CT_DIRECTION, Data: []byte{original}},
		{Type: unix.NFTA_CT_SREG, Data: binaryutil.BigEndian.PutUint32(1)},
	})
	if err != nil {
		return err
	}
	if ct, err = netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_EXPR_NAME, Data: []byte("ct\x00")},
		{Type: netlink.Nested | unix.NFTA_EXPR_DATA, Data: ct},
	}); err != nil {
		return err
	}
	exprs = append(exprs, netlink.Attribute{Type: netlink.Nested | unix.NFTA_LIST_ELEM, Data: ct})
	list, err := netlink.MarshalAttributes(exprs)
	if err != nil {
		return err
	}
	rule, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: []byte(nftTable().Name + "\x00")},
		{Type: unix.NFTA_RULE_CHAIN, Data: []byte("zone\x00")},
		{Type: netlink.Nested | unix.NFTA_RULE_EXPRESSIONS, Data: list},
	})
	if err != nil {
		return err
	}
	_, err = conn.SendMessages([]netlink.Message{
		{
			Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_BEGIN, Flags: netlink.Request},
			Data:   nfgenmsg(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES),
		},
		{
			Header: netlink.Header{
				Type:  unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWRULE,
				Flags: netlink.Request | netlink.Acknowledge | netlink.Create | netlink.Append,
			},
			Data: append(nfgenmsg(byte(nftables.TableFamilyINet), 0), rule...),
		},
		{
			Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_END, Flags: netlink.Request},
			Data:   nfgenmsg(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES),
		},
	})
	if err != nil {
		return err
	}
	if _, err = conn.Receive(); err != nil {
		return fmt.Errorf("give our connections a zone: %w", err)
	}
	return nil
}

// nfgenmsg is what every message of netfilter begins with.
func nfgenmsg(family byte, resource uint16) []byte {
	return append([]byte{family, unix.NFNETLINK_V0}, binaryutil.BigEndian.PutUint16(resource)...)
}

// match joins the parts of one rule. Each part loads a register and compares it, and
// the rule ends at the first that does not match.
func match(parts ...[]expr.Any) []expr.Any {
	var all []expr.Any
	for _, part := range parts {
		all = append(all, part...)
	}
	return all
}

func compare(op expr.CmpOp, data []byte) expr.Any {
	return &expr.Cmp{Op: op, Register: 1, Data: data}
}

func notLoopback() []expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, "lo")
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, compare(expr.CmpOpNeq, name)}
}

func tcp() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, compare(expr.CmpOpEq, []byte{unix.IPPROTO_TCP})}
}

// opens matches a segment that opens a connection.
func opens() []expr.Any {
	const syn, rst, ack = 0x02, 0x04, 0x10
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{syn | rst | ack}, Xor: []byte{0}},
		compare(expr.CmpOpEq, []byte{syn}),
	}
}

// toPort matches a segment to, or to none of, the ports.
func toPort(op expr.CmpOp, all ...uint16) []expr.Any {
	exprs := []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}}
	for _, port := range all {
		exprs = append(exprs, compare(op, binaryutil.BigEndian.PutUint16(port)))
	}
	return exprs
}

// toLocal matches a packet whose destination is, or is not, an address of the pod.
func toLocal(op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		compare(op, binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)),
	}
}

// socketMarkIs matches a packet that is, or is not, of the agent's own connections.
func socketMarkIs(op expr.CmpOp) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, compare(op, binaryutil.NativeEndian.PutUint32(socketMark))}
}

func markIn(value, mask uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(mask), Xor: make([]byte, 4),
		},
		compare(expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(value)),
	}
}

func setMark(value uint32) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binaryutil.NativeEndian.PutUint32(value)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
	}
}

func connectionMarkIs(value uint32) []expr.Any {
	return []expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: 1}, compare(expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(value))}
}

func setConnectionMark(value uint32) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binaryutil.NativeEndian.PutUint32(value)},
		&expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: 1},
	}
}

// isReply matches a packet of whoever did not open the connection.
func isReply() []expr.Any {
	const reply = 1 // IP_CT_DIR_REPLY
	return []expr.Any{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, compare(expr.CmpOpEq, []byte{reply})}
}

// redirected matches a packet of a connection whose destination was changed.
func redirected() []expr.Any {
	const destinationNAT = 1 << 5 // IPS_DST_NAT
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(destinationNAT), Xor: make([]byte, 4),
		},
		compare(expr.CmpOpNeq, make([]byte, 4)),
	}
}

func redirect(port uint16) []expr.Any {
	const portGiven = 2 // NF_NAT_RANGE_PROTO_SPECIFIED
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.Redir{RegisterProtoMin: 1, Flags: portGiven},
	}
}

func reset() []expr.Any { return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}} }

func accept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }
