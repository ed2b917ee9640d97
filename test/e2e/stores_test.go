package e2e_test

import (
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"troth.dev/troth/kube"
	"troth.dev/troth/storage"
	"troth.dev/troth/storage/kubernetes"
	"troth.dev/troth/storage/postgres"
	postgrestest "troth.dev/troth/test/postgres"
)

// sharedStore is where several replicas keep everything, each behind a wire of its
// own that can be cut.
type sharedStore interface {
	// flags are for a replica that reaches the API server by the config, and the
	// store by nothing but the wire.
	flags(t *testing.T, config *rest.Config) (flags []string, w *wire)
	// open returns the store for the test itself.
	open(t *testing.T) ledgerStore
}

type ledgerStore interface {
	storage.AuthorityStore
	storage.Ledger
}

// postgresStore is a database of a PostgreSQL of the test's own.
type postgresStore struct{ url string }

func newPostgresStore(t *testing.T) postgresStore {
	return postgresStore{postgrestest.Start(t).Database(t)}
}

func (s postgresStore) flags(t *testing.T, config *rest.Config) ([]string, *wire) {
	t.Helper()
	at, err := url.Parse(s.url)
	if err != nil {
		t.Fatal(err)
	}
	q := at.Query()
	socket := filepath.Join(q.Get("host"), ".s.PGSQL.5432") // libpq's name for it
	w := newWire(t, "unix", socket)
	at.Host = w.address
	q.Del("host")
	q.Set("sslmode", "disable") // on loopback
	at.RawQuery = q.Encode()
	file := filepath.Join(t.TempDir(), "postgres")
	if err := os.WriteFile(file, []byte(at.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"-postgres=" + file, "-kubeconfig=" + cluster.Kubeconfig(t, config)}, w
}

func (s postgresStore) open(t *testing.T) ledgerStore {
	t.Helper()
	store, err := postgres.Open(t.Context(), postgres.Config{URL: s.url})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { check(t, store.Close()) })
	return store
}

// kubernetesStore is a namespace.
type kubernetesStore struct{ namespace string }

// newKubernetesStore gives the server's account the rights that
// docs/kubernetes-store.md has.
func newKubernetesStore(t *testing.T) kubernetesStore {
	t.Helper()
	s := kubernetesStore{cluster.CreateNamespace(t, "store-")}
	rbac := cluster.Client().RbacV1()
	_, err := rbac.Roles(s.namespace).Create(t.Context(), &rbacv1.Role{
		ObjectMeta: metav1.ObjectMeta{Name: "troth-store"},
		Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{"troth-authorities"}, Verbs: []string{"get", "watch", "update"}},
			{APIGroups: []string{""}, Resources: []string{"secrets"}, Verbs: []string{"create"}},
			{APIGroups: []string{""}, Resources: []string{"configmaps"}, Verbs: []string{"get", "list", "watch", "create", "update", "delete"}},
		},
	}, metav1.CreateOptions{})
	check(t, err)
	_, err = rbac.RoleBindings(s.namespace).Create(t.Context(), &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "troth-store"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "troth-store"},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: system, Name: serverAccount}},
	}, metav1.CreateOptions{})
	check(t, err)
	return s
}

func (s kubernetesStore) flags(t *testing.T, config *rest.Config) ([]string, *wire) {
	t.Helper()
	at, err := url.Parse(config.Host)
	if err != nil {
		t.Fatal(err)
	}
	w := newWire(t, "tcp", at.Host)
	through := rest.CopyConfig(config)
	through.Host = "https://" + w.address
	return []string{"-kubernetes-store=" + s.namespace, "-kubeconfig=" + cluster.Kubeconfig(t, through)}, w
}

func (s kubernetesStore) open(t *testing.T) ledgerStore {
	t.Helper()
	client, err := kube.NewClient(cluster.Admin())
	if err != nil {
		t.Fatal(err)
	}
	store, err := kubernetes.Open(t.Context(), kubernetes.Config{Client: client, Namespace: s.namespace})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

// wire passes bytes on to where it leads, until it is cut: then whoever talks over
// it hears nothing any more, and whoever comes is not answered.
type wire struct {
	address string
	network string
	to      string

	mu    sync.Mutex
	cut   bool              // guarded by mu
	open  map[net.Conn]bool // guarded by mu; both ends of all that is open
	ended sync.WaitGroup
}

func newWire(t *testing.T, network, to string) *wire {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{address: l.Addr().String(), network: network, to: to, open: make(map[net.Conn]bool)}
	w.ended.Go(func() {
		for {
			front, err := l.Accept()
			if err != nil {
				return // the test has ended
			}
			w.ended.Go(func() { w.pass(front) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		w.mu.Lock()
		for c := range w.open {
			c.Close()
		}
		w.mu.Unlock()
		w.ended.Wait()
	})
	return w
}

func (w *wire) pass(front net.Conn) {
	w.remember(front)
	defer w.forget(front)
	back, err := net.DialTimeout(w.network, w.to, time.Second)
	if err != nil {
		return
	}
	w.remember(back)
	defer w.forget(back)
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{front, back}, {back, front}} {
		both.Go(func() {
			w.copy(way[0], way[1])
			front.Close()
			back.Close()
		})
	}
	both.Wait()
}

// copy passes on what it reads, and swallows it while the wire is cut.
func (w *wire) copy(to io.Writer, from io.Reader) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		w.mu.Lock()
		cut := w.cut
		w.mu.Unlock()
		if cut {
			continue
		}
		if _, err := to.Write(buffer[:n]); err != nil {
			return
		}
	}
}

func (w *wire) remember(c net.Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.open[c] = true
}

func (w *wire) forget(c net.Conn) {
	c.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.open, c)
}

func (w *wire) pull() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = true
}

// plug mends the wire for who comes anew: of what went before, bytes are missing.
func (w *wire) plug() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = false
	for c := range w.open {
		c.Close()
	}
}
