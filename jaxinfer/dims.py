"""The letters that array names carry.

An array is named with its axes in order, `q_TNH` or `pages_PSKH`; einsum strings use the same letters. A 1
is an axis of length one, save in `R1`.

| letter | axis |
|---|---|
| B | slots: sequences that decode, or may |
| Q | queries of a slot that decodes |
| k | tokens that are proposed to follow the newest of a slot |
| d | places on a path of a tree of proposed tokens, that of the newest token first |
| R | sequences of the ragged prefill |
| R1 | R + 1: the first row of each of them, and the end of the last |
| T | tokens of a step, flat: what decodes first, then the ragged prefill |
| W | rows of a step that need logits; in `tree_mask_BQW`, 32-bit words of a mask |
| n | steps of one program |
| m | micro-batches of a step in a pipe |
| t | rows of one of them; tokens of one device's part, where devices share them |
| p | rows of all stages of a pipe at once, of t each |
| C | a block of what is too much at once: keys of a sequence's pages, or tokens of the vocabulary |
| D | hidden size |
| N | query heads |
| K | KV heads (slots of KV heads on a mesh with more devices than KV heads) |
| g | query heads per KV head; in `qkv_DKgH` also one key and one value head |
| H | head size |
| r | pairs of a head's components that rotary embedding turns |
| M | all query heads flattened, N x H |
| F | hidden size of the MLP |
| c | halves of a fused up projection: gate and up, or up alone |
| E | experts |
| X | experts per token |
| V | vocabulary |
| I | entries of a request's logit bias; in training, steps of one dispatch |
| Z | stop tokens of a request |
| L | layers |
| P | pages in the pool |
| S | slots of one page: tokens that it holds |
| J | pages that one row of a page table can name |
"""
