package e2e_test

import (
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"testing"
)

// cable is a network namespace of the test's own, and the one link by which it
// reaches the rest of this machine.
type cable struct {
	namespace string
	outside   string // the link's name at this end
	address   string // of this end
}

// newCable makes both. They end with the test.
func newCable(t *testing.T) *cable {
	t.Helper()
	name := fmt.Sprintf("te%08x", rand.Uint32())
	subnet := fmt.Sprintf("10.%d.%d", 64+rand.N(64), rand.N(256))
	c := &cable{namespace: name, outside: name + "o", address: subnet + ".1"}
	inside := name + "i"
	c.ip(t, "netns", "add", name)
	t.Cleanup(func() { c.ip(t, "netns", "del", name) }) // and the link with it
	c.ip(t, "link", "add", c.outside, "type", "veth", "peer", "name", inside, "netns", name)
	c.ip(t, "addr", "add", c.address+"/30", "dev", c.outside)
	c.ip(t, "link", "set", c.outside, "up")
	c.ip(t, "-n", name, "addr", "add", subnet+".2/30", "dev", inside)
	c.ip(t, "-n", name, "link", "set", inside, "up")
	c.ip(t, "-n", name, "link", "set", "lo", "up")
	return c
}

func (c *cable) ip(t *testing.T, args ...string) {
	t.Helper()
	if output, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Errorf("ip %q: %v\n%s(this test needs root, and iproute2: apt-get install iproute2)", args, err, output)
		if args[len(args)-2] != "del" {
			t.FailNow()
		}
	}
}

// pull cuts the link, and plug brings it back.
func (c *cable) pull(t *testing.T) { c.ip(t, "link", "set", c.outside, "down") }
func (c *cable) plug(t *testing.T) { c.ip(t, "link", "set", c.outside, "up") }

// command is one of our programs, to run inside.
func (c *cable) command(name string, args ...string) *exec.Cmd {
	inside := append([]string{"--net=/run/netns/" + c.namespace, filepath.Join(programs, name)}, args...)
	return exec.Command("nsenter", inside...)
}
