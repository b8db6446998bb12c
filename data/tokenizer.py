"""The two tokenizers: GPT-2's byte-pair encoding (by tiktoken), and plain bytes.

Both start every document with their end-of-text id, which is the largest one.
"""

import numpy as np

from cli import UserError

VOCAB_SIZE = {"gpt2": 50257, "bytes": 257}
END_OF_TEXT = {name: size - 1 for name, size in VOCAB_SIZE.items()}
END = "<|endoftext|>"  # how that token is written


class Bytes:
    """Ids 0-255 are UTF-8 bytes, 256 starts a document."""

    def encode_ordinary(self, text):
        return encode_to_numpy(self, text, set()).tolist()

    def encode_to_numpy(self, text, allowed_special=(), disallowed_special=()):
        text = text.encode()
        if END in allowed_special:
            text = text.replace(END.encode(), b"\xff")  # a byte that UTF-8 never has
        ids = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
        ids[ids == 0xFF] = END_OF_TEXT["bytes"]
        return ids

    def decode_single_token_bytes(self, token):
        return bytes([token]) if token < 256 else END.encode()


def load_tokenizer(name):
    """A tokenizer ("gpt2" or "bytes") with encode_ordinary(text) -> ids and decode_single_token_bytes(id) -> bytes.

    Raises UserError if GPT-2's vocabulary is neither cached by tiktoken nor to be downloaded.
    """
    if name == "bytes":
        return Bytes()
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' many ways to say that there is no network
        raise UserError(
            f"tokenizer gpt2: tiktoken could not download GPT-2's vocabulary ({type(error).__name__}): connect once, "
            "or set TIKTOKEN_CACHE_DIR to a folder that holds it"
        ) from error


def encode_documents(tokenizer, end_of_text, pieces):
    """The tokens of some documents, uint16 (n,). pieces: [(whether a document starts here, text)].

    "<|endoftext|>" in a text is ordinary text.
    """
    joined = "".join(END + text if starts else text for starts, text in pieces)
    if joined.count(END) == sum(starts for starts, _ in pieces):  # none is in a text: one call does it all
        return encode_to_numpy(tokenizer, joined, {END})
    parts = []
    for starts, text in pieces:
        parts.append(np.array([end_of_text] * starts, dtype=np.uint16))
        parts.append(encode_to_numpy(tokenizer, text, set()))
    return np.concatenate(parts)


def encode_to_numpy(tokenizer, text, special):
    """Text as uint16 (n,), without holding up other threads as lists do."""
    try:
        tokens = tokenizer.encode_to_numpy(text, allowed_special=special, disallowed_special=())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot: U+FFFD for it
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        tokens = tokenizer.encode_to_numpy(text, allowed_special=special, disallowed_special=())
    return tokens.astype(np.uint16)


def decode(tokenizer, tokens):
    """The text of some token ids, with U+FFFD for bytes that are no UTF-8."""
    return b"".join(tokenizer.decode_single_token_bytes(token) for token in tokens).decode(errors="replace")
