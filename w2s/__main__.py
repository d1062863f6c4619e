"""`python -m w2s`: the `w2s` command."""

from w2s.cli import main

if __name__ == "__main__":
    main()
