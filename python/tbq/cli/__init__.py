# SPDX-License-Identifier: MIT
"""The command line: a module for each command; nothing else knows argparse."""
