"""Matrix memories of tokens: linear attention, the delta rule, Oja's rule, the omega rule."""
