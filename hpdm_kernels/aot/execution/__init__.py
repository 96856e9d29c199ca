"""Executes the compiled kernels (PTX of sm_80 and sm_90) on the CPU, instruction by instruction, and checks them."""
