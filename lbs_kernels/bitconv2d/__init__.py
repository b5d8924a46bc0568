"""Integer convolution of codes with bit-plane weights."""
