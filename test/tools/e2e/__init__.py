"""Real SGLang servers, patched and unpatched, on one GPU or two: `make e2e`."""
