# SPDX-License-Identifier: MIT
"""llama-server as an object."""
