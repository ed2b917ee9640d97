package kubernetes_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	clientset "k8s.io/client-go/kubernetes"

	"troth.dev/troth/storage"
	"troth.dev/troth/storage/kubernetes"
	"troth.dev/troth/test/apiserver"
)

const secretName = "troth-authorities"

func admin() clientset.Interface { return cluster.Client() }

// While the Secret is missing nobody is told that there never was one, neither a
// replica that saw it nor one that is opened later. When it is restored, all goes
// on where it was.
func TestDeletedSecret(t *testing.T) {
	namespace := cluster.CreateNamespace(t, "troth-")
	s := openAt(t, cluster.Admin(), namespace)
	secrets := admin().CoreV1().Secrets(namespace)
	first, err := s.Swap(t.Context(), "", []byte("first"))
	if err != nil {
		t.Fatal(err)
	}
	backup, err := secrets.Get(t.Context(), secretName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	second, err := s.Swap(t.Context(), first.Version, []byte("second"))
	if err != nil {
		t.Fatal(err)
	}
	missing := func(s *kubernetes.Store) {
		t.Helper()
		if d, err := s.Load(t.Context()); err == nil || !strings.Contains(err.Error(), "restore it") {
			t.Errorf("Load() without the Secret = %q, %v, want an error that says what to do", d.Version, err)
		}
		for _, old := range []string{"", first.Version, second.Version} {
			if _, err := s.Swap(t.Context(), old, []byte("new")); err == nil {
				t.Errorf("Swap(%q) without the Secret succeeded", old)
			}
		}
	}
	woken := wakes(t, s, second.Version)
	if err := secrets.Delete(t.Context(), secretName, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	missing(s)

	// Nobody depends on an authority that issued nothing.
	if d, err := openAt(t, cluster.Admin(), namespace).Load(t.Context()); err != nil || d.Version != "" {
		t.Errorf("Load() by a new replica while nothing was issued = %q, %v, want no document", d.Version, err)
	}
	if err := s.Record(t.Context(), issuance()); err != nil {
		t.Fatal(err)
	}
	missing(s)
	missing(openAt(t, cluster.Admin(), namespace))

	backup.ResourceVersion, backup.UID = "", ""
	if _, err := secrets.Create(t.Context(), backup, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	await(t, woken, "first")
	third, err := s.Swap(t.Context(), first.Version, []byte("third"))
	if err != nil || third.Version == second.Version {
		t.Errorf("Swap after the restore = %q, %v, want another version than %q", third.Version, err, second.Version)
	}
	if _, err := s.Swap(t.Context(), second.Version, []byte("x")); !errors.Is(err, storage.ErrConflict) {
		t.Errorf("Swap(the version that the restore undid) = %v, want ErrConflict", err)
	}
}

// What somebody changes by hand is another document; what is no document of ours
// is an error.
func TestForeignHands(t *testing.T) {
	namespace := cluster.CreateNamespace(t, "troth-")
	s := openAt(t, cluster.Admin(), namespace)
	secrets := admin().CoreV1().Secrets(namespace)
	stored, err := s.Swap(t.Context(), "", []byte("by us"))
	if err != nil {
		t.Fatal(err)
	}
	change := func(change func(*corev1.Secret)) {
		t.Helper()
		secret, err := secrets.Get(t.Context(), secretName, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		change(secret)
		if _, err := secrets.Update(t.Context(), secret, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	woken := wakes(t, s, stored.Version)
	change(func(s *corev1.Secret) { s.Labels = map[string]string{"of": "theirs"} })
	if d, err := s.Load(t.Context()); err != nil || d.Version != stored.Version {
		t.Errorf("Load() after somebody labelled the Secret = %q, %v, want %q still", d.Version, err, stored.Version)
	}
	change(func(s *corev1.Secret) { s.Data["document"] = []byte("by hand") })
	await(t, woken, "by hand")
	if _, err := s.Swap(t.Context(), stored.Version, []byte("x")); !errors.Is(err, storage.ErrConflict) {
		t.Errorf("Swap(the version before the hand) = %v, want ErrConflict", err)
	}
	change(func(s *corev1.Secret) { s.Data["document"] = make([]byte, storage.MaxDocument+1) })
	if _, err := s.Load(t.Context()); !errors.Is(err, storage.ErrDocumentSize) {
		t.Errorf("Load(too large a document) = %v, want ErrDocumentSize", err)
	}
	change(func(s *corev1.Secret) { delete(s.Data, "document") })
	if _, err := s.Load(t.Context()); err == nil || !strings.Contains(err.Error(), `has no "document"`) {
		t.Errorf("Load(no document) = %v, want an error", err)
	}

	other := cluster.CreateNamespace(t, "troth-")
	if _, err := admin().CoreV1().Secrets(other).Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: secretName}, Data: map[string][]byte{"document": []byte("x")},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := openAt(t, cluster.Admin(), other).Load(t.Context()); err == nil || !strings.Contains(err.Error(), "another program's") {
		t.Errorf("Load(another program's Secret) = %v, want an error", err)
	}
}

// However much one call records, and however long its texts are, no ConfigMap
// comes near to what etcd takes, and small Records share one.
func TestSizes(t *testing.T) {
	namespace := cluster.CreateNamespace(t, "troth-")
	s := openAt(t, cluster.Admin(), namespace)
	sizes := func() (sizes []int) {
		t.Helper()
		batches, err := admin().CoreV1().ConfigMaps(namespace).List(t.Context(), metav1.ListOptions{LabelSelector: "troth.dev/store=ledger"})
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range batches.Items {
			sizes = append(sizes, b.Size())
		}
		return sizes
	}
	var serials []string
	record := func(all ...storage.Issuance) {
		t.Helper()
		for _, i := range all {
			serials = append(serials, i.Serial)
		}
		if err := s.Record(t.Context(), all...); err != nil {
			t.Fatal(err)
		}
	}
	const small = 160
	for range small {
		record(issuance())
	}
	if got := sizes(); len(got) > 2 {
		t.Errorf("%d Records made %d ConfigMaps of %d bytes, want up to 2", small, len(got), got)
	}
	var many []storage.Issuance
	for n := range 5000 {
		i := issuance()
		i.IssuedAt = i.IssuedAt.Add(-time.Duration(n) * time.Millisecond)
		many = append(many, i)
	}
	record(many...)
	var long []storage.Issuance
	for n := range 120 {
		i := issuance()
		if n < 60 {
			text := strings.Repeat("\x01", 2048) // six bytes for each in JSON
			i.AuthorityID, i.Caller, i.Node, i.PodUID = text, text, text, text
		} else {
			for _, text := range []*string{&i.AuthorityID, &i.Caller, &i.Node, &i.PodUID} {
				random := make([]byte, 1536) // which nothing compresses
				rand.Read(random)
				*text = base64.StdEncoding.EncodeToString(random)
			}
		}
		long = append(long, i)
	}
	record(long...)
	checkRecorded(t, s, serials)
	largest := 0
	for _, size := range sizes() {
		largest = max(largest, size)
	}
	t.Logf("%d ConfigMaps, the largest of %d bytes", len(sizes()), largest)
	if largest < 100<<10 || largest > 260<<10 {
		t.Errorf("the largest ConfigMap has %d bytes, want more than 100 KiB, to test anything, and at most 260", largest)
	}
}

// A batch that cannot be read makes Query fail, and say which it is: what it held
// is not known. Recording and pruning go on.
func TestDamagedBatch(t *testing.T) {
	namespace := cluster.CreateNamespace(t, "troth-")
	s := openAt(t, cluster.Admin(), namespace)
	expired := issuance()
	expired.NotAfter = expired.IssuedAt.Add(time.Second)
	for _, i := range []storage.Issuance{expired, issuance()} {
		if err := s.Record(t.Context(), i); err != nil {
			t.Fatal(err)
		}
	}
	configMaps := admin().CoreV1().ConfigMaps(namespace)
	foreign, err := s.Batch("aaa-damaged", expired)
	if err != nil {
		t.Fatal(err)
	}
	for key := range foreign.BinaryData {
		foreign.BinaryData[key] = []byte("x")
	}
	if _, err := configMaps.Create(t.Context(), foreign, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	check := func(s *kubernetes.Store) {
		t.Helper()
		if _, err := s.Query(t.Context(), storage.Query{}); err == nil || !strings.Contains(err.Error(), "aaa-damaged") {
			t.Errorf("Query = %v, want an error that names the damaged batch", err)
		}
		if err := s.Record(t.Context(), issuance()); err != nil {
			t.Errorf("Record = %v", err)
		}
	}
	check(s)
	var log bytes.Buffer
	cfg := config(t, cluster.Admin(), namespace)
	cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	later, err := kubernetes.Open(t.Context(), cfg)
	if err != nil {
		t.Fatalf("Open(a ledger with a damaged batch) = %v", err)
	}
	check(later)
	if err := later.Close(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "aaa-damaged") {
		t.Errorf("the log does not name the damaged batch: %s", &log)
	}
	n, err := s.Prune(t.Context(), expired.NotAfter.Add(time.Minute))
	if n != 1 || err == nil || !strings.Contains(err.Error(), "aaa-damaged") {
		t.Errorf("Prune = %d, %v, want 1 and an error that names the damaged batch", n, err)
	}
	if err := configMaps.Delete(t.Context(), "aaa-damaged", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := len(all(t, s)); got != 3 {
		t.Errorf("the ledger has %d issuances, want 3", got)
	}
}

// A service account that has the rights that the documentation names, and no
// others, can do all that a store does, and reads no other Secret. With less it
// cannot open the store.
func TestRights(t *testing.T) {
	text, err := os.ReadFile("../../docs/kubernetes-store.md")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindSubmatch(text)
	if block == nil {
		t.Fatal("the documentation has no Role")
	}
	var role rbacv1.Role
	if err := yaml.UnmarshalStrict(block[1], &role); err != nil {
		t.Fatalf("read the documentation's Role: %v", err)
	}

	namespace := cluster.CreateNamespace(t, "troth-")
	account := cluster.CreateServiceAccount(t, namespace, "troth-server")
	node := cluster.CreateNode(t, "node-")
	pod := cluster.CreatePod(t, apiserver.Pod{Namespace: namespace, Name: "troth-server-", ServiceAccount: account.Name, Node: node.Name})
	as := cluster.Bearer(cluster.AutomountToken(t, pod))
	other, err := admin().CoreV1().Secrets(namespace).Create(t.Context(),
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "other"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}

	if _, err := kubernetes.Open(t.Context(), config(t, as, namespace)); !apierrors.IsForbidden(err) {
		t.Errorf("Open without rights = %v, want forbidden", err)
	}
	roles := admin().RbacV1().Roles(namespace)
	created, err := roles.Create(t.Context(), &role, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := admin().RbacV1().RoleBindings(namespace).Create(t.Context(), &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: role.Name},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: role.Name},
		Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: namespace, Name: account.Name}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	// The authorizer learns of it by a watch.
	eventually(t, "the account may open the store", func() bool {
		s, err := kubernetes.Open(t.Context(), config(t, as, namespace))
		if err == nil {
			s.Close()
		}
		return err == nil
	})

	s := openAt(t, as, namespace)
	useAll(t, s)
	secrets := config(t, as, namespace).Client.CoreV1().Secrets(namespace)
	if _, err := secrets.Get(t.Context(), other.Name, metav1.GetOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("read another Secret: %v, want forbidden", err)
	}
	if _, err := secrets.List(t.Context(), metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("list all Secrets: %v, want forbidden", err)
	}

	// Without the right to watch, what others do would be noticed late.
	for n := range created.Rules {
		less := created.DeepCopy()
		less.ResourceVersion = ""
		less.Rules[n].Verbs = nil
		for _, verb := range created.Rules[n].Verbs {
			if verb != "watch" {
				less.Rules[n].Verbs = append(less.Rules[n].Verbs, verb)
			}
		}
		if len(less.Rules[n].Verbs) == len(created.Rules[n].Verbs) {
			continue
		}
		if _, err := roles.Update(t.Context(), less, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, "Open without a watch is forbidden", func() bool {
			s, err := kubernetes.Open(t.Context(), config(t, as, namespace))
			if err == nil {
				s.Close()
			}
			return apierrors.IsForbidden(err) && strings.Contains(err.Error(), created.Rules[n].Resources[0])
		})
	}
}

// useAll calls every method.
func useAll(t *testing.T, s *kubernetes.Store) {
	t.Helper()
	first, err := s.Swap(t.Context(), "", []byte("first"))
	if err != nil {
		t.Fatalf("Swap = %v", err)
	}
	woken := wakes(t, s, first.Version)
	if _, err := s.Swap(t.Context(), first.Version, []byte("second")); err != nil {
		t.Fatalf("Swap = %v", err)
	}
	await(t, woken, "second")
	if _, err := s.Load(t.Context()); err != nil {
		t.Errorf("Load() = %v", err)
	}
	expired, valid := issuance(), issuance()
	expired.NotAfter = expired.IssuedAt.Add(time.Second)
	for _, call := range [][]storage.Issuance{{expired, valid}, {issuance()}} {
		if err := s.Record(t.Context(), call...); err != nil {
			t.Errorf("Record = %v", err)
		}
	}
	if err := s.Record(t.Context(), valid); !errors.Is(err, storage.ErrDuplicateSerial) {
		t.Errorf("Record(a duplicate) = %v, want ErrDuplicateSerial", err)
	}
	if found, err := s.Query(t.Context(), storage.Query{ValidAt: time.Now()}); err != nil || len(found) < 2 {
		t.Errorf("Query = %d issuances, %v, want 2 or 3", len(found), err)
	}
	for want, before := range []time.Time{1: expired.NotAfter.Add(time.Minute), 2: valid.NotAfter.Add(time.Minute)} {
		if want == 0 {
			continue
		}
		if n, err := s.Prune(t.Context(), before); n != want || err != nil {
			t.Errorf("Prune = %d, %v, want %d, nil", n, err, want)
		}
	}
	for range 2 {
		if err := s.Publish(t.Context(), "a", []byte("summary")); err != nil {
			t.Errorf("Publish = %v", err)
		}
	}
	if got, err := s.Summaries(t.Context()); err != nil || len(got) != 1 {
		t.Errorf("Summaries() = %v, %v", got, err)
	}
	if err := s.Withdraw(t.Context(), "a"); err != nil {
		t.Errorf("Withdraw = %v", err)
	}
	for version := ""; ; {
		next, err := s.Tests().Swap(t.Context(), version, []byte(version))
		if err != nil {
			t.Fatalf("Swap of the document for tests = %v", err)
		}
		if version != "" {
			break
		}
		version = next.Version
	}
	if err := s.Spend(t.Context(), "issuer", "token", valid.NotAfter); err != nil {
		t.Errorf("Spend = %v", err)
	}
	if n, err := s.PruneSpent(t.Context(), valid.NotAfter.Add(time.Minute)); n != 1 || err != nil {
		t.Errorf("PruneSpent = %d, %v, want the one", n, err)
	}
}

// The document for tests is not missed where it was never seen, although the ledger
// lists certificates: they are the other trust domain's. A Store that has seen it says
// that it is gone.
func TestDeletedTestSecret(t *testing.T) {
	namespace := cluster.CreateNamespace(t, "troth-")
	s := openAt(t, cluster.Admin(), namespace)
	if err := s.Record(t.Context(), issuance()); err != nil {
		t.Fatal(err)
	}
	first, err := s.Tests().Swap(t.Context(), "", []byte("first"))
	if err != nil {
		t.Fatalf("Swap(the first document for tests) = %v", err)
	}
	if err := admin().CoreV1().Secrets(namespace).Delete(t.Context(), "troth-test-authorities", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Tests().Load(t.Context()); err == nil || !strings.Contains(err.Error(), "restore it") {
		t.Errorf("Load(a document that was seen and is gone) = %v, want an error", err)
	}
	if d, err := openAt(t, cluster.Admin(), namespace).Tests().Load(t.Context()); err != nil || d.Version != "" {
		t.Errorf("Load by another Store = %q, %v, want no document", d.Version, err)
	}
	if _, err := s.Tests().Swap(t.Context(), first.Version, []byte("x")); err == nil {
		t.Error("Swap of what is gone succeeded")
	}
}

// Close ends what waits, and everything after it is refused.
func TestClose(t *testing.T) {
	s := open(t)
	waiting := make(chan error, 1)
	go func() {
		_, err := s.Watch(t.Context(), "")
		waiting <- err
	}()
	for range 2 {
		if err := s.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	}
	if err := <-waiting; !errors.Is(err, storage.ErrClosed) {
		t.Errorf("Watch when the store is closed = %v, want ErrClosed", err)
	}
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"Load":      func() error { _, err := s.Load(ctx); return err },
		"Swap":      func() error { _, err := s.Swap(ctx, "", nil); return err },
		"Watch":     func() error { _, err := s.Watch(ctx, ""); return err },
		"Record":    func() error { return s.Record(ctx, issuance()) },
		"Query":     func() error { _, err := s.Query(ctx, storage.Query{}); return err },
		"Prune":     func() error { _, err := s.Prune(ctx, time.Now()); return err },
		"Publish":   func() error { return s.Publish(ctx, "a", nil) },
		"Summaries": func() error { _, err := s.Summaries(ctx); return err },
		"Withdraw":  func() error { return s.Withdraw(ctx, "a") },
		"Spend":     func() error { return s.Spend(ctx, "issuer", "token", time.Now()) },
		"Tests":     func() error { _, err := s.Tests().Load(ctx); return err },
	} {
		if err := call(); !errors.Is(err, storage.ErrClosed) {
			t.Errorf("%s after Close = %v, want ErrClosed", name, err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	good := config(t, cluster.Admin(), cluster.CreateNamespace(t, "troth-"))
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, test := range []struct {
		name, want string
		ctx        context.Context
		config     kubernetes.Config
	}{
		{"no client", "Client", t.Context(), kubernetes.Config{Namespace: good.Namespace}},
		{"no namespace", "Namespace", t.Context(), kubernetes.Config{Client: good.Client}},
		{"ended context", "context canceled", ended, good},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, err := kubernetes.Open(test.ctx, test.config)
			if err == nil || s != nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Open = %v, want an error with %q", err, test.want)
			}
		})
	}
}
