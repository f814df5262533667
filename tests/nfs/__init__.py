"""Tests of the layout server. Protocol tests name the section of the RFC in their docstrings."""
