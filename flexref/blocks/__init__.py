"""Block masks, from a mask_mod to what engines walk over. In the order of the story:

inputs      what a user may pass to make one, checked
mask_mods   mask mods made of mask mods: and, or, not, shifted, concatenated
runs        runs of consecutive columns, and what can be done with them alone
lists       the lists of blocks of a grid, full ones as runs, and what can be done with them without a mask_mod
sound       what is wrong with lists that come from outside
split       the kinds of all blocks by asking about large tiles first
estimate    how long that takes where the program is not known
build       the lists of a mask_mod: split by its program, what stays open asked exactly
algebra     what can be done with lists and a mask_mod together: combine, crop, slice, compare
walk        what engines read of the lists
steps       the lists of some queries, as each step of decoding takes them
state       what a BlockMask holds and nobody can change; copies, pickles, trees
torch_form  from and to torch's padded tensors and torch's own BlockMask
operators   BlockMasks made of BlockMasks: `& | ~ - ^`, rows, resize, transpose, concat
printing    one as text
counts      how many positions are allowed in a block
stats       what a block mask means for the work of attention
mask        BlockMask and create_block_mask
found       the BlockMask that a score_mod carries in itself
packed      mods of one document among packed ones
nested      the BlockMask of a jagged nested tensor
"""
