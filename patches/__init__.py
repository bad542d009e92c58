"""Where, in which versions of a host framework, a core call is put in."""
