"""Names that OpenRLHF imports from flash-attn. None of them is called without packing."""
