package keyhelper

import "io"

// CheckResponse reads a response, and its public key if there is one, as Keys do.
func CheckResponse(message []byte) error {
	r, err := parseResponse(message)
	if err != nil {
		return err
	}
	if r.PublicKey != nil {
		_, err = parsePublicKey(r.PublicKey)
	}
	return err
}

// ReadFrame reads one message.
func ReadFrame(r io.Reader) ([]byte, error) { return readFrame(r) }
