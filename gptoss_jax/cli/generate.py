"""`gptoss generate`."""

import dataclasses
import itertools
import sys
from typing import TYPE_CHECKING, Annotated

import tyro

from gptoss_jax.cli.arguments import Folder, OptionalText, Sampling, SamplingFlags, Texts
from gptoss_jax.cli.model import open_model
from gptoss_jax.status import until_first

if TYPE_CHECKING:
    from gptoss_jax.data.tokenizer import Tokenizer
    from gptoss_jax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Generate:
    """Generate text from a prompt.

    The text is streamed to stdout, starting with the prompt; the speed is printed to stderr.

    Examples:
      gptoss generate runs/quickstart --prompt "def read(self):"
      gptoss generate hf:openai/gpt-oss-20b --prompt "The sky is" --temperature 0
      gptoss generate runs/lora --prompt "Q: " --stop-strings "Q:" --max-new-tokens 50
    """

    # Model: a run folder, a Hugging Face folder, or hf:OWNER/NAME to download one from the Hugging Face Hub.
    folder: Folder
    # Text to continue; "" starts from nothing.
    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    # LoRA adapter to apply: a PEFT folder, or a run that trained adapters.
    adapter: OptionalText = None
    # Mesh of devices to split the model over, such as tensor=2. (default: one device)
    mesh: OptionalText = None
    # Stop before this text appears.
    stop_strings: Texts = ()
    sampling: Sampling = SamplingFlags()

    def run(self) -> None:
        with open_model(self.folder, self.adapter, self.mesh) as (model, tokenizer):
            self._run(model, tokenizer)

    def _run(self, model: "Transformer", tokenizer: "Tokenizer") -> None:
        from gptoss_jax.cli.terminal import Throughput, writer
        from gptoss_jax.config.paths import user_text
        from gptoss_jax.inference.chat import PLAIN
        from gptoss_jax.inference.detokenizer import StreamingDetokenizer
        from gptoss_jax.inference.generate import stream

        prompt = user_text(self.prompt)
        prompt_tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        # A prompt that leaves no room at all is a separate error.
        left = max(model.config.max_position_embeddings - len(prompt_tokens), 1)
        default = dataclasses.replace(
            PLAIN,
            max_new_tokens=min(PLAIN.max_new_tokens, left),
            stop_tokens=tokenizer.stop_ids,
            stop_strings=tuple(map(user_text, self.stop_strings)),
        )
        params = self.sampling.update(default)
        chunks = stream(model, [prompt_tokens], params, tokenizer=tokenizer)
        write, throughput = writer(sys.stdout), Throughput()
        detokenizer = StreamingDetokenizer(tokenizer, params.stop_strings)
        # Two programs: one reads the prompt, the other decodes.
        chunks = until_first("compiling", chunks)
        first = next(chunks, None)
        write(prompt, dim=True)
        chunks = chunks if first is None else itertools.chain([first], chunks)
        try:
            for tokens in throughput.count(part.tokens for (part,) in chunks):
                write(detokenizer.feed(tokens))
        except KeyboardInterrupt:
            write("\n")
            raise
        write(detokenizer.close() + "\n")
        writer(sys.stderr)(f"{throughput}\n", dim=True)
