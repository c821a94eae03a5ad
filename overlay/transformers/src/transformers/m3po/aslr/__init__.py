# SPDX-License-Identifier: Apache-2.0
"""ASLR: an inner loop over latent paths that refines the final hidden state."""
