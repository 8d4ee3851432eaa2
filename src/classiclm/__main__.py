"""python -m classiclm"""

import sys

from classiclm.cli import main

sys.exit(main())
