package kubernetes_test

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"troth.dev/troth/storage"
	"troth.dev/troth/storage/kubernetes"
)

// replicas opens several stores of one namespace.
func replicas(t testing.TB, n int) (namespace string, stores []*kubernetes.Store) {
	t.Helper()
	namespace = cluster.CreateNamespace(t, "troth-")
	for range n {
		stores = append(stores, openAt(t, cluster.Admin(), namespace))
	}
	return namespace, stores
}

// What one replica recorded, every other finds at once; its serial number is
// refused by all as soon as their watches have brought it, and by one that is
// opened later from the start.
func TestReplicasShareTheLedger(t *testing.T) {
	namespace, stores := replicas(t, 3)
	const each = 30
	var running sync.WaitGroup
	var mu sync.Mutex
	var serials []string
	for n, s := range stores {
		running.Go(func() {
			for range each {
				i := issuance()
				if err := s.Record(t.Context(), i); err != nil {
					t.Errorf("Record = %v", err)
					return
				}
				found, err := stores[(n+1)%len(stores)].Query(t.Context(), storage.Query{Serial: i.Serial})
				if err != nil || len(found) != 1 {
					t.Errorf("Query by another replica = %d rows, %v, want 1", len(found), err)
					return
				}
				mu.Lock()
				serials = append(serials, i.Serial)
				mu.Unlock()
			}
		})
	}
	running.Wait()
	for n, s := range stores {
		checkRecorded(t, s, serials)
		for _, serial := range serials {
			eventually(t, fmt.Sprintf("replica %d knows %s", n, serial), func() bool { return s.Knows(serial) })
		}
	}
	for _, s := range append(stores, openAt(t, cluster.Admin(), namespace)) {
		for _, serial := range []string{serials[0], serials[each], serials[len(serials)-1]} {
			again, other := issuance(), issuance()
			again.Serial = serial
			if err := s.Record(t.Context(), other, again); !errors.Is(err, storage.ErrDuplicateSerial) {
				t.Errorf("Record(a serial number that a replica recorded) = %v, want ErrDuplicateSerial", err)
			}
			if found, err := s.Query(t.Context(), storage.Query{Serial: other.Serial}); err != nil || len(found) != 0 {
				t.Errorf("Query(what came with a duplicate) = %v, %v, want nothing", found, err)
			}
		}
	}
	if got := len(all(t, stores[0])); got != len(serials) {
		t.Errorf("the ledger has %d issuances, want %d", got, len(serials))
	}
}

// The increments of all replicas count, and all that watch come to the last one.
func TestReplicasShareTheDocument(t *testing.T) {
	_, stores := replicas(t, 3)
	const increments = 10
	last := strconv.Itoa(len(stores) * increments)
	var running sync.WaitGroup
	for _, s := range stores {
		running.Go(func() {
			for done := 0; done < increments; {
				d, err := s.Load(t.Context())
				if err != nil {
					t.Errorf("Load() = %v", err)
					return
				}
				count, _ := strconv.Atoi(string(d.Data))
				_, err = s.Swap(t.Context(), d.Version, []byte(strconv.Itoa(count+1)))
				switch {
				case err == nil:
					done++
				case !errors.Is(err, storage.ErrConflict):
					t.Errorf("Swap = %v", err)
					return
				}
			}
		})
		running.Go(func() {
			for seen := ""; ; {
				d, err := s.Watch(t.Context(), seen)
				if err != nil {
					t.Errorf("Watch = %v", err)
					return
				}
				if string(d.Data) == last {
					return
				}
				seen = d.Version
			}
		})
	}
	running.Wait()
}

// A replica's batch that another one prunes is not added to again, and nothing is
// lost by it.
func TestPruneOfAnOpenBatch(t *testing.T) {
	_, stores := replicas(t, 2)
	recorder, pruner := stores[0], stores[1]
	var serials []string
	for round, keep := range []bool{true, false, true} {
		expired, valid := issuance(), issuance()
		expired.NotAfter = expired.IssuedAt.Add(time.Second)
		rows := []storage.Issuance{expired}
		if keep {
			rows = append(rows, valid)
			serials = append(serials, valid.Serial)
		}
		if err := recorder.Record(t.Context(), rows...); err != nil {
			t.Fatal(err)
		}
		if n, err := pruner.Prune(t.Context(), expired.NotAfter.Add(time.Minute)); n != 1 || err != nil {
			t.Fatalf("round %d: Prune = %d, %v, want 1, nil", round, n, err)
		}
		after := issuance()
		serials = append(serials, after.Serial)
		if err := recorder.Record(t.Context(), after); err != nil {
			t.Fatalf("round %d: Record into what was pruned = %v", round, err)
		}
		checkRecorded(t, pruner, serials)
		if got := len(all(t, recorder)); got != len(serials) {
			t.Fatalf("round %d: the ledger has %d issuances, want %d", round, got, len(serials))
		}
		// What was pruned is forgotten everywhere, although the index may be late.
		if err := recorder.Record(t.Context(), expired); err != nil {
			t.Fatalf("round %d: Record(what was pruned) = %v, want nil", round, err)
		}
		if n, err := pruner.Prune(t.Context(), expired.NotAfter.Add(time.Minute)); n != 1 || err != nil {
			t.Fatalf("round %d: Prune = %d, %v, want 1, nil", round, n, err)
		}
	}
	for _, s := range stores {
		eventually(t, "the index has what the ledger has", func() bool {
			_, known := s.Known()
			return known == len(serials)
		})
	}
}

// What is recorded between Prune's look at a batch and its deletion stays.
func TestPruneOfWhatGrewMeanwhile(t *testing.T) {
	namespace, stores := replicas(t, 2)
	expired, valid := issuance(), issuance()
	expired.NotAfter = expired.IssuedAt.Add(time.Second)
	if err := stores[0].Record(t.Context(), expired); err != nil {
		t.Fatal(err)
	}
	seen, err := admin().CoreV1().ConfigMaps(namespace).List(t.Context(), metav1.ListOptions{LabelSelector: "troth.dev/store=ledger"})
	if err != nil || len(seen.Items) != 1 {
		t.Fatalf("list the batches: %d, %v, want 1", len(seen.Items), err)
	}
	if err := stores[0].Record(t.Context(), valid); err != nil {
		t.Fatal(err)
	}
	for _, want := range []int{1, 0} { // the second time another replica was first
		n, err := stores[1].PruneBatch(t.Context(), &seen.Items[0], expired.NotAfter.Add(time.Minute))
		if n != want || err != nil {
			t.Errorf("prune what grew meanwhile = %d, %v, want %d, nil", n, err, want)
		}
	}
	checkRecorded(t, stores[1], []string{valid.Serial})
}

// That the index takes a serial number for one that is there is no reason to refuse
// it.
func TestIndexIsAskedAboutAndNotBelieved(t *testing.T) {
	namespace, stores := replicas(t, 1)
	if err := stores[0].Record(t.Context(), issuance()); err != nil {
		t.Fatal(err)
	}
	batches, err := admin().CoreV1().ConfigMaps(namespace).List(t.Context(), metav1.ListOptions{LabelSelector: "troth.dev/store=ledger"})
	if err != nil || len(batches.Items) != 1 {
		t.Fatalf("list the batches: %d, %v, want 1", len(batches.Items), err)
	}
	i := issuance()
	stores[0].Suspect(i.Serial, batches.Items[0].Name)
	for _, want := range []error{nil, storage.ErrDuplicateSerial} {
		if err := stores[0].Record(t.Context(), i); !errors.Is(err, want) {
			t.Errorf("Record(a serial number under suspicion) = %v, want %v", err, want)
		}
	}
}

// A replica hears of another one's Swap by its watch. If it only polled, this would
// take minutes.
func TestWatchHearsOfOthers(t *testing.T) {
	_, stores := replicas(t, 2)
	begin, version := time.Now(), ""
	for n := range 20 {
		woken := wakes(t, stores[1], version)
		next, err := stores[0].Swap(t.Context(), version, []byte(strconv.Itoa(n)))
		if err != nil {
			t.Fatal(err)
		}
		await(t, woken, strconv.Itoa(n))
		version = next.Version
	}
	if took := time.Since(begin); took > 40*time.Second {
		t.Errorf("20 documents took %s", took)
	}
}

// A watch from a moment that the API server has forgotten, and one from a moment
// that never was, end in a new list.
func TestFollowFromAForgottenMoment(t *testing.T) {
	cluster.KillAPIServer(t) // which remembers what it saw since it started
	cluster.StartAPIServer(t)
	_, stores := replicas(t, 2)
	i := issuance()
	if err := stores[1].Record(t.Context(), i); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the serial number is known", func() bool { return stores[0].Knows(i.Serial) })
	for _, version := range []string{"1", "9000000000000"} {
		ctx, cancel := context.WithCancel(t.Context())
		var following sync.WaitGroup
		stores[0].Forget()
		following.Go(func() { stores[0].FollowFrom(ctx, version) })
		eventually(t, "the serial number is known again, from version "+version, func() bool { return stores[0].Knows(i.Serial) })
		cancel()
		following.Wait()
	}
}

// wakes begins to watch and returns what the Watch returned.
func wakes(t *testing.T, s *kubernetes.Store, seen string) <-chan storage.Document {
	t.Helper()
	woken := make(chan storage.Document, 1)
	go func() {
		d, err := s.Watch(t.Context(), seen)
		if err != nil {
			t.Errorf("Watch(%q) = %v", seen, err)
		}
		woken <- d
	}()
	return woken
}

func await(t *testing.T, woken <-chan storage.Document, want string) {
	t.Helper()
	select {
	case d := <-woken:
		if string(d.Data) != want {
			t.Errorf("Watch = %q, want %q", d.Data, want)
		}
	case <-time.After(patience):
		t.Fatalf("Watch did not return %q", want)
	}
}

// The API server and etcd are killed while three replicas record, again and
// again. What was acknowledged is there, once; a Watch that waited all the while
// wakes; and the replicas learn of each other's serial numbers again.
func TestOutages(t *testing.T) {
	namespace, stores := replicas(t, 3)
	first, err := stores[0].Swap(t.Context(), "", []byte("first"))
	if err != nil {
		t.Fatal(err)
	}
	woken := wakes(t, stores[1], first.Version)

	ctx, cancel := context.WithCancel(t.Context())
	var recording sync.WaitGroup
	var mu sync.Mutex
	var serials []string
	failed := 0
	for _, s := range stores {
		for range 4 {
			recording.Go(func() {
				for ctx.Err() == nil {
					i := issuance()
					err := s.Record(ctx, i)
					mu.Lock()
					if err == nil {
						serials = append(serials, i.Serial)
					} else {
						failed++
					}
					mu.Unlock()
					if err != nil { // as an agent would
						select {
						case <-time.After(20 * time.Millisecond):
						case <-ctx.Done():
						}
					}
				}
			})
		}
	}
	acknowledged := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(serials)
	}
	more := func() {
		t.Helper()
		before := acknowledged()
		eventually(t, "Records succeed", func() bool { return acknowledged() > before+100 })
	}
	for range 2 {
		more()
		cluster.KillAPIServer(t)
		cluster.StartAPIServer(t)
		more()
		cluster.RestartEtcd(t)
	}
	more()
	cancel()
	recording.Wait()
	if failed == 0 {
		t.Error("no Record failed in four outages")
	}

	d, err := stores[0].Load(t.Context())
	if err != nil || d.Version != first.Version {
		t.Fatalf("Load() after the outages = %q, %v, want %q", d.Version, err, first.Version)
	}
	if _, err := stores[0].Swap(t.Context(), d.Version, []byte("second")); err != nil {
		t.Fatal(err)
	}
	await(t, woken, "second")
	for _, s := range stores {
		checkRecorded(t, s, serials)
	}
	news := issuance()
	if err := stores[2].Record(t.Context(), news); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a replica learns of a serial number after the outages", func() bool { return stores[0].Knows(news.Serial) })
	batches, err := config(t, cluster.Admin(), namespace).Client.CoreV1().ConfigMaps(namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d issuances acknowledged, %d Records failed, %d ConfigMaps", len(serials), failed, len(batches.Items))
}
