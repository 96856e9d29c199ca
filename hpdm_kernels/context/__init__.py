"""Context of a patch from the coarser levels (paper eq. 7 to 9), and its fusion into the patch's tokens."""
