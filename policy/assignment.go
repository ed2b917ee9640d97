package policy

import "troth.dev/troth/identity"

// Assignment is a pod, and the policy in force for connections to it.
type Assignment struct {
	Pod identity.Pod
	// Policy is shared and never changed; a nil one refuses every connection.
	Policy *Effective
}
