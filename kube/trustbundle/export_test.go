package trustbundle

// AnchorsIn returns the certificates of a published text.
func AnchorsIn(text string) map[string]bool { return anchorsIn(text) }
