"""Clear matrices times numbers that the matrix's owner never sees, with all encryption done ahead, on masks.

A matrix W of integers (d, m) is the server's; t = 2**32; everything is modulo t.

1. ahead, client: seeds; from them masks r, uniform in Z_t^d, one for each of N = 2048 columns (`masks`)
2. ahead, client: a fresh RLWE key, one ciphertext for each of d features, which holds N numbers: Enc(r) (`client`)
3. ahead, server: W^T times the stack of residues modulo q: the stack of ciphertexts of W^T r (`product`)
4. ahead, client: decrypts W^T r, keeps it beside the seeds, erases the key
5. online, client: s = x + r for numbers x; it is uniform whatever x is, a one-time pad, and never used again
6. online, server: s W in clear integers (`product`)
7. online, client: s W - W^T r = x W, exactly, if the true sum fits 32 bits; it may check that (`verify`)

There are no evaluation keys, and the server keeps nothing. W is not hidden from the client: some answers determine it.

Sources: Mishra and others, "Delphi: A Cryptographic Inference Service for Neural Networks", USENIX Security 2020, for
the two phases; Bae, Cheon, Hanrot, Park and Stehle, "Plaintext-ciphertext matrix multiplication and FHE bootstrapping:
fast and fused", CRYPTO 2024, ePrint 2024/1284, for step 3. Importing this package imports no library of encryption.
"""

from .client import ClientBatch
from .masks import mask, masks, new_seed
from .parameters import MatrixReport, Parameters, check_matrix, column_norms, failure_log2
from .product import Matrix
from .residues import pack_answer, pack_request, unpack_answer, unpack_request
from .verify import Verifier

__all__ = [
    "ClientBatch",
    "Matrix",
    "MatrixReport",
    "Parameters",
    "Verifier",
    "check_matrix",
    "column_norms",
    "failure_log2",
    "mask",
    "masks",
    "new_seed",
    "pack_answer",
    "pack_request",
    "unpack_answer",
    "unpack_request",
]
