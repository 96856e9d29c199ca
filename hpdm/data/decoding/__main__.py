"""``python -m hpdm.data.decoding``: serves on standard input and output until the pipe ends."""

from hpdm.data.decoding.server import main

if __name__ == "__main__":
    main()
