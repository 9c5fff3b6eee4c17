"""TFHE: small integers and lookup tables."""
