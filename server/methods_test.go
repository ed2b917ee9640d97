package server

import (
	"maps"
	"slices"
	"testing"

	"google.golang.org/grpc"
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
	for method, kinds := range permitted {
		if len(kinds) == 0 {
			t.Errorf("nobody may call %s", method)
		}
	}
}

func TestAMethodWithoutARowIsRefused(t *testing.T) {
	_, err := (&Server{}).admit(t.Context(), "/troth.v1.NodeService/Unheard")
	if err != refusals.methodNotPermitted { //nolint:errorlint // the very value
		t.Errorf("admit(a method without a row) = %v, want METHOD_NOT_PERMITTED", err)
	}
}
