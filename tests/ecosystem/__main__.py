"""`python -m tests.ecosystem`: see `run`."""

import sys

from tests.ecosystem.standins import stand_in

replaced = stand_in()  # before torchmetrics or anything else imports those packages

from tests.ecosystem.run import main  # noqa: E402

main(sys.argv[1:], replaced)
