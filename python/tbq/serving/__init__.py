# SPDX-License-Identifier: MIT
"""tbq.Server: llama-server as an object."""
