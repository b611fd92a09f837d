"""Compile every kernel for every GPU it ships for, without a GPU, and hold the machine code to its limits."""
