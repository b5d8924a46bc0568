"""Packed networks as ONNX files: integers between QuantizeLinear and DequantizeLinear, as other engines read them."""
