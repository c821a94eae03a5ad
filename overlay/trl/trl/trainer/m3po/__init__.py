# SPDX-License-Identifier: Apache-2.0
"""GRPO with thinking inputs and with ASLR: the trainer's side. The model's and the decode loop's side is
`transformers.m3po`; `hooks` is what the patched files of TRL call.
"""
