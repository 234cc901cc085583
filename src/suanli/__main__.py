"""`python -m suanli` is `suanli`."""

from suanli.cli import main

main()
