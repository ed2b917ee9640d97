package podcert

// CheckStub says whether a certificate request has a key and asks for nothing.
func CheckStub(der []byte) error { return checkStub(der) }
