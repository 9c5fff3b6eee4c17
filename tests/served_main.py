"""`jaxgpt2`, which knows the functions of `served` too, and may have less patience.

Workers begin with the same module as their server.
"""

import os

import fhe
import served

fhe.register_functions(served.project, served.attend, served.nap, served.crash, served.widen)

if __name__ == "__main__":
    from jaxgpt2.cli import main

    if "PATIENCE" in os.environ:
        from jaxgpt2.serving import asgi

        asgi.PATIENCE = float(os.environ["PATIENCE"])
    main()
