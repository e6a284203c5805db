"""Tensor operations, one per module: public function, reference in torch, registration of the compiled op."""
