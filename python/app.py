"""Web page to sample from a checkpoint by class or prompt; shows the image, its trajectory and its spectra.

    python python/app.py CHECKPOINT [--size 256] [--port 7860]

Needs gradio (`pip install 'deco_kernels[app]'`). By default the page is served only on this machine; see --host.

Exit status: 0; 2 if gradio is missing or checkpoint, size, device or port cannot be used (with one line on stderr).
"""

import argparse
import socket
import sys
from pathlib import Path

from command_line.failures import exit_status, importing, out_of_memory

with importing("'deco_kernels[app]'"):
    from deco_kernels.command_line import image_size, positive, thread_count

SAMPLER_OPTIONS = ("solver", "steps", "guidance", "guidance_interval", "shift")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)

    def run() -> None:
        check_address(options.host, options.port)
        build(painter_of(options)).launch(server_name=options.host, server_port=options.port, show_error=True)

    return exit_status(run)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python/app.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="any file that model.load_model reads")
    parser.add_argument(
        "--size", type=image_size, default=(256, 256), metavar="S|HxW", help="image size (default: 256)"
    )
    parser.add_argument("--weights", choices=["ema", "raw"], help="weights to load (default: ema if the file has both)")
    parser.add_argument("--device", help="PyTorch device (default: cuda if available, else cpu)")
    parser.add_argument("--threads", type=thread_count, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument(
        "--text-encoder",
        default="Qwen/Qwen3-1.7B",
        metavar="FOLDER|ID",
        help="text encoder of a text-to-image model (default: %(default)s)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    parser.add_argument("--port", type=positive, help="port to serve on (default: the first free port from 7860)")
    parser.set_defaults(**dict.fromkeys(SAMPLER_OPTIONS))
    return parser.parse_args(arguments)


def check_address(host: str, port: int | None) -> None:
    """Raises ValueError if the page cannot be served at this host and port; None means any port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port or 0), family=family).close()
    except (OSError, OverflowError) as error:
        where = host if port is None else f"{host}, port {port}"
        raise ValueError(f"--host, --port: cannot serve at {where} ({error}); choose another") from error


def painter_of(options: argparse.Namespace):
    """The `sampling.page.Painter` of a checkpoint. Raises ImportError without gradio, or as `inputs.load_network`."""
    require_gradio()
    from sampling import inputs
    from sampling.page import Painter

    device = inputs.device_of(options)
    network = inputs.load_network(options.checkpoint, options, device)
    conditioner = inputs.Conditioner.of(network, device, options.text_encoder)
    settings = inputs.solver_settings(options, network)
    begin = settings.pop("steps"), settings.pop("guidance")
    return Painter(network, conditioner, *begin, settings, options.size)


def require_gradio():
    """Imports and returns gradio. Raises ImportError with install instructions if it cannot be imported."""
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            f"the page needs gradio, which cannot be imported ({error}); install it: pip install 'deco_kernels[app]'"
        ) from error
    return gradio


def build(painter):
    """Builds the page, a `gradio.Blocks`, for a `sampling.page.Painter`."""
    gradio = require_gradio()
    from deco_kernels.flow.samplers import has_halves
    from sampling.inputs import reads_text
    from sampling.page import MOST_STEPS

    def sample(*fields, progress=gradio.Progress(track_tqdm=True)):  # noqa: B008
        try:
            shown = painter(*fields)
        except (ValueError, TypeError) as error:
            raise gradio.Error(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise gradio.Error("an image of this size does not fit into memory; serve with a smaller --size") from error
        return shown.image, shown.frames, shown.spectrum

    with gradio.Blocks(title="DeCo", analytics_enabled=False) as page:
        height, width = painter.size
        gradio.Markdown(
            f"# DeCo\n{type(painter.network).__name__}, {height}×{width}, {painter.settings['solver']} solver"
        )
        with gradio.Row():
            with gradio.Column():
                if reads_text(painter.network):
                    condition = gradio.Textbox(label="Prompt")
                else:
                    last = painter.network.trunk.num_classes - 1
                    condition = gradio.Number(label=f"Class, 0 to {last}", value=0, precision=0)
                inputs = [
                    condition,
                    gradio.Slider(1, MOST_STEPS, value=painter.steps, step=1, label="Steps"),
                    gradio.Slider(1, 10, value=painter.guidance, step=0.1, label="Guidance"),
                    gradio.Number(label="Seed", value=0, precision=0),
                    gradio.Slider(
                        1,
                        MOST_STEPS,
                        value=MOST_STEPS,
                        step=1,
                        label="Trunk steps",
                        info="Steps that run the trunk, an approximation; as many as Steps, or more: every step",
                        visible=has_halves(painter.network),
                    ),
                ]
                button = gradio.Button("Sample", variant="primary")
            image = gradio.Image(
                label="Sample", format="png", height=320, buttons=["download", "fullscreen"], elem_id="sample"
            )
            plot = gradio.Plot(label="DCT spectrum", elem_id="spectrum")
        frames = gradio.Gallery(label="Trajectory, from noise to sample", columns=8, height=220, elem_id="trajectory")
        button.click(sample, inputs, [image, frames, plot], api_name="sample")
    return page


if __name__ == "__main__":
    sys.exit(main())
