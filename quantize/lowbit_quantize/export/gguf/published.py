"""By which name llama.cpp knows a published tokenizer: by what it makes of one text.

The table is that of llama.cpp's converter (conversion/base.py, MIT licence), of the names whose rules are known here; a
key is the first half of its SHA-256.
"""

from hashlib import sha256
from typing import Any

PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f (multiple "
    "emojis concatenated) \u2705 \U0001f999\U0001f999 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "\u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f\u17a2\u17b6\u1785\U0001f601 "
    "?\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e ------======= \u043d\u0435\u0449\u043e \u043d\u0430 "
    "\u0411\u044a\u043b\u0433\u0430\u0440\u0441\u043a\u0438 ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told "
    "he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
NAMES = {
    "9c2227e4dd922002fb81bde4fc02b048": "command-r",
    "a8594e3edff7c29c003940395316294b": "dbrx",
    "347715f544604f9118bb75ed199f6877": "deepseek-coder",
    "049ecf7629871e3041641907f3de7c73": "deepseek-llm",
    "b3f499bb4255f8ca19fccd6644432833": "deepseek-r1-qwen",
    "877081d19cf6996e2c4ff0e1236341e9": "deepseek-v3",
    "8aeee3860c56296a157a1fe2fad249ec": "falcon",
    "0fe1cf6eda062318a1af7270f3331a85": "gpt-2",
    "3ce83efda5659b07b1ad37ca97ca5797": "gpt-2",
    "ccc2ef013c104be7bae2965776d611e1": "gpt-4o",
    "0ef9807a4087ebef797fc74939043900": "llama-bpe",
    "b6dc8df998e1cfbdc4eac8243701a65a": "olmo",
    "fcace8b9cac38ce847670c970cd58920": "phi-2",
    "d4540891389ea895b53b399da6ac824b": "qwen2",
    "e636dc30a262dcc0d8c323492e32ae2b": "qwen2",
    "6221ad2852e85ce96f791f476e0b390c": "refact",
    "c136ed14d01c2745d4f60a9596ae6680": "smaug-bpe",
    "855059429035d75a914d1eda9f10a876": "smollm",
    "35d91631860c815f952d711435f48d35": "starcoder",
    "63b97e4253352e6f357cc59ea5b583e3": "tekken",
}


def published_name(tokenizer: Any) -> str | None:
    """The name of a tokenizer as transformers opens it; None where it is no published one."""
    return NAMES.get(sha256(str(tokenizer.encode(PROBE)).encode()).hexdigest()[:32])
