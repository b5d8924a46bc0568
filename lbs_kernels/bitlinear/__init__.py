"""Integer matrix product of codes with bit-plane weights."""
