package server

import (
	"maps"
	"slices"
	"testing"

	"google.golang.org/grpc"

	"troth.dev/troth/identity"
)

// The table has a row for each method of each service that is registered, and
// none for a method that is not.
func TestEveryMethodHasARow(t *testing.T) {
	g := grpc.NewServer()
	(&Server{}).register(g)
	var registered []string
	for service, info := range g.GetServiceInfo() {
		for _, method := range info.Methods {
			registered = append(registered, "/"+service+"/"+method.Name)
		}
	}
	slices.Sort(registered)
	rows := slices.Sorted(maps.Keys(permitted))
	if !slices.Equal(registered, rows) {
		t.Errorf("the table of methods has\n%q\nand the services have\n%q", rows, registered)
	}
	for method, may := range permitted {
		if len(may.kinds) == 0 && !may.jobs {
			t.Errorf("nobody may call %s", method)
		}
		if slices.Contains(may.kinds, identity.Operator) != (may.right != Right{}) {
			t.Errorf("%s is for %v with the right %v: operators, and only they, have to have one", method, may.kinds, may.right)
		}
	}
}

func TestAMethodWithoutARowIsRefused(t *testing.T) {
	_, err := (&Server{}).admit(t.Context(), "/troth.v1.NodeService/Unheard")
	if err != refusals.methodNotPermitted { //nolint:errorlint // the very value
		t.Errorf("admit(a method without a row) = %v, want METHOD_NOT_PERMITTED", err)
	}
}
