"""Published data sets protected in their own layout: the same tree, so that training code runs on it unchanged.

`table` describes each data set, `annotations` and `coco` read its masks, `tree` finds out what becomes of every file,
`run` does it, and `command` is `unseg protect-dataset`.
"""
