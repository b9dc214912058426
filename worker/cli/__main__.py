"""`python -m worker.cli`: the same as `tokentrail`, for the children that it starts itself."""

from worker.cli import main

main()
