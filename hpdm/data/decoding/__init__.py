"""The process that decodes videos: a decoder that hangs or crashes ends this process, not the training process.

:mod:`hpdm.data.decoder_process` starts it (``python -m hpdm.data.decoding``) and talks to it over pipes. Nothing here
imports other parts of the product but the readers and writers of files, which need the standard library alone, so that
a start costs no more than importing numpy and the codecs.

The first sight of a file is a **scan** (:mod:`~hpdm.data.decoding.scan`): one sequential decode from the first packet,
as ``ffmpeg -i FILE`` makes it. It gives the number of frames, their times, and a checksum of each frame, and is kept on
disk (:mod:`~hpdm.data.decoding.memory`). Every later read decodes no more than it must
(:mod:`~hpdm.data.decoding.with_pyav`) and compares its frames with the checksums, so that a seek that lands anywhere
else than it should is noticed and mended. :mod:`~hpdm.data.decoding.with_decord` says which files decord may read.
"""
