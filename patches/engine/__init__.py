"""The patch engine: puts wrapper functions into a host and takes them out again. It knows no host."""
