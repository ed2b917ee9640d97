package pods

// For the fuzz target.

func ParseRecord(content []byte) (uid string, err error) {
	r, err := parseRecord(content)
	return r.Pod.UID, err
}
