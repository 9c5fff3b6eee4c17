"""Encrypted heads on two machines: bundles for both, a server that computes, a client that keeps text and keys.

The server's part imports neither JAX nor the model: it runs the functions of circuits, whatever they compute.
"""
