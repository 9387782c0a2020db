"""``python -m optlm`` is the `optlm` command."""

from optlm.cli import main

if __name__ == "__main__":
    main()
