package cni

import "net"

// For the fuzz targets, which have no agent and no plugin.

func ParseRequest(body []byte) (verb string, pod *Pod, keep []Attachment, err error) {
	r, err := parseRequest(body)
	if err != nil {
		return "", nil, nil, err
	}
	return r.Verb, r.Pod, r.Keep, nil
}

func ReadAnswer(conn *net.UnixConn) error { return converse(conn, request{}, nil) }
