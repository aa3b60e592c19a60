"""Which of optax's own tests run with which paged optimizers, and what is left out of them.

`test_optax_suite.py` runs them.
"""

import re
import unittest
from typing import TYPE_CHECKING, Any, NamedTuple

import paged_optax
from paged_optax import Quantization

if TYPE_CHECKING:
    from test_optax_suite import Case

KNOWN_OPTAX = "0.2.8"  # what the tables below were written for

# Leaves are small in these tests, so moments are float32 unless min_size says otherwise.
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "8bit": {"quantization": Quantization(min_size=0)},
    "replay": {"quantization": Quantization(min_size=0), "replay": True},
}
ONE_SLOT = ("float32", "8bit")

# What has the same arguments as an optimizer of optax, by the name of that.
PAGED = {
    "adagrad": (paged_optax.paged_adagrad8bit, {}),
    "adam": (paged_optax.paged_adam8bit, {}),
    "adamw": (paged_optax.paged_adamw8bit, {}),
    "ademamix": (paged_optax.paged_ademamix8bit, {}),
    "ema": (paged_optax.scale_by_paged_ema8bit, {}),
    "lamb": (paged_optax.paged_lamb8bit, {}),
    "lars": (paged_optax.paged_lars8bit, {}),
    "lion": (paged_optax.paged_lion8bit, {}),
    "muon": (paged_optax.paged_muon8bit, {}),
    "nadam": (paged_optax.paged_adam8bit, {"nesterov": True}),
    "nadamw": (paged_optax.paged_nadamw8bit, {}),
    "rmsprop": (paged_optax.paged_rmsprop8bit, {}),
    "scale_by_adam": (paged_optax.scale_by_paged_adam8bit, {}),
    "scale_by_lion": (paged_optax.scale_by_paged_lion8bit, {}),
    "scale_by_rms": (paged_optax.scale_by_paged_rms8bit, {}),
    "scale_by_rss": (paged_optax.scale_by_paged_rss8bit, {}),
    "scale_by_stddev": (paged_optax.scale_by_paged_stddev8bit, {}),
    "sgd": (paged_optax.paged_sgd8bit, {}),
    "signum": (paged_optax.paged_signum8bit, {}),
    "trace": (paged_optax.scale_by_paged_trace8bit, {}),
}
# Public, and in no test of optax.
NOT_IN_OPTAX = {
    "scale_by_paged_ademamix8bit": "optax tests the whole optimizer, `ademamix`",
    "scale_by_paged_signum8bit": "optax has no such link: its `signum` is an `ema` and a sign",
}


ALIASES = ("adam", "adamw", "nadam", "nadamw")
ADAMS = (*ALIASES, "scale_by_adam")
# With the same tests as Adam.
FAMILY = ("adagrad", "lamb", "lars", "lion", "rmsprop", "sgd", "signum")
CONTRIB = ("ademamix", "muon")
MECHANIZED = ("lamb", "lion", "rmsprop")
# By `paged(tx)`: two, three and four arrays a parameter, and a `jax.lax.cond` over the whole tree.
# `tests/test_any_optimizers.py` has all of them.
ANY = ("adan", "amsgrad", "novograd")
ANY_CONTRIB = ("madgrad",)


# What tells a test of an optimizer that has a paged form, in its source.
CONCERNS_US = rf"\b({'|'.join(PAGED.keys() - {'ema', 'sgd', 'trace'})})\b|\.(ema|trace)\("
CONCERNS_US += r"|sgd\(.*momentum=0\.[1-9]"


class Suite(NamedTuple):
    """Tests of one module of optax.

    Attributes:
      module: its name, without ``optax.``.
      tests: regular expression for the start of ``Class.test (parameters)``.
      tables: its tables of optimizers, and the names whose rows stay.
      paged: names that mean a paged optimizer: that in `PAGED`, or `paged(tx)` of optax's.
      instead: what else to replace, and how: by the optimizer of that name in `PAGED`, or by a
        method of `Substitution`.
      variants: which of `VARIANTS` run, each with a regular expression like `tests`.
    """

    module: str
    tests: str = ""
    tables: dict[str, tuple[str, ...]] = {}
    paged: tuple[str, ...] = ADAMS
    instead: dict[str, str] = {}
    variants: dict[str, str] = {"8bit": ""}


BOTH = {"float32": "", "8bit": ""}
# Where a test knows SGD's numbers, a paged optimizer runs beside SGD and its updates are dropped.
BESIDE_SGD = {"sgd": "beside"}
COMBINING = (
    r"\w+\.test_chain|ExtraArgsTest\.test_extra_args$"
    r"|PartitionTest\.test_(empty|labels_mismatch[01])"
)
STATES_KEPT = r"\w+\.test_(gradient_accumulation.*bfloat16|state_shape.*\.float32|optimizers_can)"
NUMBERS = r"\w+\.test_(optimization\d|optimizers\d)"
LINKS = ("trace", "trace_with_nesterov", "scale_by_rss", "scale_by_rms", "scale_by_stddev")
LINKS += ("adagrad", "lamb", "rmsprop")
NOT_SKIPPED = r"(?!.*'(adan|lion|signum)'.*complex|.*'signum'.*rosenbrock)"  # by optax
ONE_DTYPE = r"(?!.*(stability.*(bfloat16|float32)|(preserve|accumulation).*'float32'))"
HARDEST = r"(?!(?!.*'signum').*test_optimization.*parabola)"
COMBINING_LINKS = r"\w+\.test_(chain|partition|labels_mismatch)"

SUITES = (
    Suite(
        "_src.alias_test",
        r"AliasTest\.(?!.*sgd_mom)",
        {"_OPTIMIZERS_UNDER_TEST": ALIASES},
        variants={"float32": "", "8bit": NUMBERS, "replay": STATES_KEPT},
    ),
    Suite("_src.combine_test", COMBINING, instead=BESIDE_SGD),
    Suite("_src.float64_test", tables={"ALL_MODULES": ("adam", "adamw", "scale_by_adam")}),
    Suite(
        "_src.linesearch_test",
        r"\w+\.test_(gradient_descent_with_linesearch|recycling|armijo|value_and_grad_from_state)",
        instead=BESIDE_SGD,
    ),
    Suite(
        "_src.lookahead_test",
        instead={"_test_optimizer": "beside"},
        variants={"8bit": "", "replay": ""},
    ),
    Suite(
        "_src.transform_test",
        r"\w+\.test_(scalers_adam$|rms_match|apply_every)",
        instead=BESIDE_SGD,
        variants=BOTH,
    ),
    Suite(
        "contrib._common_test",
        # Some take the wrapper away: nothing is new then in the rows of SGD.
        "(?!.*(state_shape|accept_learning).*opt_name='sgd'|.*opt_name='sgd'.*wrap=False)",
        tables={"_MAIN_OPTIMIZERS_UNDER_TEST": ("sgd",), "_BASE_OPTIMIZERS": ("adam", "adamw")},
        instead={"sgd": "adamw"},
        variants={"float32": "", "8bit": NUMBERS, "replay": STATES_KEPT},
    ),
    Suite("contrib._complex_valued_test", r"\w+\.\w+_adam$", variants=BOTH),
    Suite(
        "contrib._galore_test",
        "(?!.*test_projector)",  # a part of GaLore's own
        instead={"galore": "base_optimizer"},
        variants={"float32": "", "8bit": ".*(converge|decreases)"},
    ),
    Suite("contrib._mechanic_test", instead={"_test_optimizer": "beside"}),
    Suite(
        "contrib._sam_test",
        # Only SGD does without a reset: Adam comes to where the gradient, to be normalized, is 0.
        tables={"_ADVERSARIAL_OPTIMIZERS_UNDER_TEST": ("sgd",)},
        instead={"sam": "keep_state", **BESIDE_SGD},
        variants={"8bit": "", "replay": ".*opaque_mode=False"},
    ),
    Suite("contrib._schedule_free_test", "(?!.*buffer_donation)", instead={"sgd": "adam"}),
    Suite("experimental._aggregating_test", "(?!.*standard1)", instead=BESIDE_SGD),
    Suite(
        "schedules._inject_test",
        r"\w+\.test_(constant|numeric_static|hyperparam_d)",
        variants=BOTH,
    ),
    Suite(
        "schedules._schedule_test",
        "ScheduleAsLearningRateTest",
        {"_OPTIMIZERS_UNDER_TEST": ALIASES},
    ),
    Suite(
        "transforms._accumulation_test",
        r"\w+\.test_multi_steps(?!_computes)",
        {"OPTIMIZERS_TO_TEST": ("adam",)},
        instead={"MultiSteps": "jit", **BESIDE_SGD},
        variants={"8bit": "(?!.*precision0)", "replay": ""},
    ),
    Suite("transforms._combining_test", COMBINING, instead=BESIDE_SGD),
    Suite(
        "transforms._conditionality_test",
        "(?!.*statefull)",
        instead={"scale": "beside", **BESIDE_SGD},
    ),
    # Without test_selective_bad_structure, which fails with SGD too: jax changed its message.
    Suite("transforms._freezing_test", r"Selective(?!.*bad_structure)", instead=BESIDE_SGD),
    Suite("transforms._layouts_test", instead=BESIDE_SGD),
    Suite(
        "transforms._masking_test",
        r"\w+\.test_(masked_(sgd|stateful)|prefix|empty|nested|mask_comp)",
        instead=BESIDE_SGD,
    ),
    Suite("transforms._monitoring_test", instead=BESIDE_SGD),
    Suite("tree_utils._state_utils_test", "(?!.*test_map_params)", instead=BESIDE_SGD),
)
# The other optimizers. Formats, replay and wrappers are one for all, so that fewer dtypes do here.
SUITES += (
    Suite(
        "_src.alias_test",
        rf"AliasTest\.(?!test_explicit_dtype.*adam){NOT_SKIPPED}",
        {"_OPTIMIZERS_UNDER_TEST": FAMILY},
        FAMILY,
        variants={"float32": f"{HARDEST}{NUMBERS}", "8bit": f"{ONE_DTYPE}{HARDEST}"},
    ),
    Suite(
        "_src.alias_test",
        rf"AliasTest\.test_(?!explicit_dtype|optimizers_can_be){NOT_SKIPPED}",
        {"_OPTIMIZERS_UNDER_TEST": ANY},
        ANY,
        variants={"8bit": f"{ONE_DTYPE}{HARDEST}"},
    ),
    Suite("_src.combine_test", COMBINING_LINKS, paged=("ema", "trace")),
    Suite("_src.float64_test", tables={"ALL_MODULES": LINKS}, paged=LINKS),
    Suite(
        "_src.transform_test",
        r"\w+\.test_(scalers_(lion|rmsprop|stddev)$|lion_|rms_match|apply_every)",
        paged=("scale_by_lion", "scale_by_rms", "scale_by_stddev", "trace"),
        variants=BOTH,
    ),
    Suite(
        "contrib._common_test",
        # Without a wrapper these are in alias_test.
        "(?!.*opt_name='sgd'|.*wrapper_name='mechanize'(?!.*_setup_parabola))",
        {"_MAIN_OPTIMIZERS_UNDER_TEST": CONTRIB, "_BASE_OPTIMIZERS": MECHANIZED},
        (*CONTRIB, *MECHANIZED),
        variants={"float32": f"{NUMBERS}(?!.*mechanize)", "8bit": ONE_DTYPE},
    ),
    Suite(
        "contrib._common_test",
        r"(?!.*opt_name='(sgd|adam)|\w+\.test_optimizers_accept_learning_rate)",
        {"_MAIN_OPTIMIZERS_UNDER_TEST": ANY_CONTRIB, "_BASE_OPTIMIZERS": ("adam",)},
        ANY_CONTRIB,
        variants={"8bit": ONE_DTYPE},
    ),
    Suite(
        "contrib._muon_test",
        # What else there is concerns orthogonalization, which is optax's here too.
        r"\w+\.test_(?!newton|reshape_inverse|.*_(aol|schatten)$|.*_aol_|.*_(tall|wide)$)",
        paged=("muon",),
    ),
    Suite("schedules._inject_test", r"\w+\.test_hyperparams_state$", paged=("trace",)),
    Suite(
        "schedules._schedule_test",
        "ScheduleAsLearningRateTest",
        {"_OPTIMIZERS_UNDER_TEST": FAMILY},
        FAMILY,
    ),
    Suite("transforms._accumulation_test", r"\w+\.test_ema", paged=("ema",), variants=BOTH),
    Suite("transforms._combining_test", COMBINING_LINKS, paged=("ema", "trace")),
    Suite("transforms._conditionality_test", r"\w+\..*statefull?_sgd", paged=("sgd",)),
    Suite("transforms._constraining_test", r"\w+\.test_keep", paged=("trace",)),
    Suite("transforms._masking_test", r"\w+\.test_.*(stateful|state_structure)", paged=("sgd",)),
    Suite("transforms._monitoring_test", paged=("sgd",)),
    Suite("tree_utils._state_utils_test", r"\w+\.test_map_params", paged=("adagrad",)),
)
# In a process with eight devices.
SHARDING = tuple(
    Suite("_src.sharding_test", "(?!.*microbatch)", {"OPTIMIZERS": names}, names, variants=variants)
    for names, variants in (
        (ALIASES, {"8bit": "", "replay": ""}),
        (("adagrad", "lamb", "lars", "lion", "rmsprop"), {"8bit": ""}),
        (ANY, {"8bit": ""}),
    )
)


class LeftOut(NamedTuple):
    """Cases that rightly raise here and not with optax.adam, or that need a larger tolerance.

    Attributes:
      test: module and name of the tests.
      what: which of their cases; this, `test` and `why` are for readers of `DOCS`.
      why: the reason.
      cases: regular expression somewhere in ``Class.test (parameters)``.
      error: what they raise; None if they hold with `rtol` and `atol`.
      match: regular expression for the error's text.
      variants: which of `VARIANTS` are affected.
      rtol, atol: tolerances that hold.
      paged: a name of `Suite.paged`; only tests of suites with it are affected. Empty for all.
    """

    test: str
    what: str
    why: str
    cases: str
    error: type[Exception] | tuple[type[Exception], ...] | None = None
    match: str = ""
    variants: tuple[str, ...] = tuple(VARIANTS)
    rtol: float = 0.0
    atol: float = 0.0
    paged: str = ""

    def has(self, case: "Case") -> bool:
        module, test = self.test.split(" ")
        return (
            module == case.suite.module
            and case.description.startswith(test)
            and re.search(self.cases, case.description) is not None
            and case.variant in self.variants
            and (not self.paged or self.paged in case.suite.paged)
        )


OLD_STATE = ((RuntimeError, ValueError), "this optimizer state is not the newest one", ONE_SLOT)
NO_OPTION = "unexpected keyword argument"
DECAY_OF_1 = (ValueError, r"decay is 1\.0; it must be in \[0, 1\)")
FLOAT64 = (TypeError, "has dtype float64")
COMPLEX64 = (TypeError, "has dtype complex64")
INT32 = (TypeError, "has dtype int32")
MU_DTYPE = (TypeError, "mu_dtype is .* it can only be None")
NO_MU_DTYPE = "`mu_dtype` can only be None: moments have 8 bits"
NO_COMPLEX = "complex parameters; `split_real_and_imaginary` takes them apart, and its test runs"
NO_FLOAT64 = "float64 parameters"
NO_DECAY_OF_1 = "a decay of 1"
NO_MU = "the moments are outside JAX; `paged_optax.moments` reads them"
TWICE = "uses a state twice, which takes `replay=True`"

LEFT_OUT = (
    LeftOut(
        "_src.alias_test AliasTest.test_explicit_dtype",
        "adam, adamw",
        f"{NO_MU_DTYPE}, and the state has no `mu`",
        "opt_name='adam",
        (TypeError, AttributeError),
        f"{MU_DTYPE[1]}|'NoneType' object has no attribute 'dtype'|has dtype complex64",
    ),
    LeftOut(
        "_src.alias_test AliasTest.test_explicit_dtype",
        "sgd with momentum",
        "`accumulator_dtype` can only be None: moments have 8 bits, and the state has no `trace`",
        "sgd_mom",
        (TypeError, AttributeError),
        "accumulator_dtype is .* it can only be None|'NoneType' object has no attribute 'dtype'"
        "|has dtype complex64",
    ),
    LeftOut(
        "_src.alias_test AliasTest.test_optimization",
        "complex64",
        NO_COMPLEX,
        "complex64",
        *COMPLEX64,
    ),
    LeftOut(
        "_src.alias_test AliasTest.test_state_shape_dtype_shard_stability",
        "complex64, complex128",
        NO_COMPLEX,
        "complex",
        TypeError,
        "has dtype complex",
    ),
    LeftOut(
        "_src.alias_test AliasTest.test_state_shape_dtype_shard_stability",
        "float64",
        NO_FLOAT64,
        "float64",
        *FLOAT64,
    ),
    LeftOut(
        "_src.combine_test ExtraArgsTest.test_extra_args",
        "all",
        "integer parameters",
        "",
        *INT32,
    ),
    LeftOut(
        "_src.combine_test PartitionTest.test_labels_mismatch",
        "with a paged trace",
        NO_DECAY_OF_1,
        "",
        *DECAY_OF_1,
        paged="trace",
    ),
    LeftOut(
        "_src.float64_test Float64Test.test_mixed_dtype_input_outputs",
        "all",
        NO_FLOAT64,
        "",
        *FLOAT64,
    ),
    LeftOut(
        "_src.transform_test TransformTest.test_lion_",
        "test_lion_modes_variants, test_lion_invalid_mode_raises",
        "there is no `mode`: Lion here is the hard one",
        "",
        TypeError,
        f"{NO_OPTION} 'mode'",
    ),
    LeftOut(
        "_src.transform_test TransformTest.test_rms_match_adam",
        "rtol=1e-6; 2e-5 holds",
        "optax's first update is off by 6e-6: `1 - b2**t` is computed in float32, `1 - b2` is not",
        "",
        variants=("float32",),
        rtol=2e-5,
    ),
    LeftOut(
        "_src.transform_test TransformTest.test_rms_match_adam",
        "rtol=1e-6 with 8-bit moments; 1e-3 holds",
        "the second moment is rounded to 8 bits",
        "",
        variants=("8bit",),
        rtol=1e-3,
    ),
    LeftOut(
        "contrib._common_test ContribTest.test_state_shape_dtype_shard_stability",
        "float64",
        NO_FLOAT64,
        "float64",
        *FLOAT64,
    ),
    LeftOut(
        "contrib._common_test ContribTest.test_optimizers_can_be_wrapped_in_inject_hyperparams",
        "reduce_on_plateau",
        "optax skips it for every optimizer",
        "reduce_on_plateau",
        unittest.SkipTest,
        "reduce_on_plateau is not supported",
    ),
    LeftOut(
        "contrib._galore_test GaLoreTest",
        "tests that read `state.mu`",
        NO_MU,
        "_projection_state_shapes|_clipped_|memory_reduction|_right_projection",
        AttributeError,
        "has no attribute 'mu'",
    ),
    LeftOut(
        "contrib._galore_test GaLoreTest",
        "test_mixed_pytree_shapes_jittable_regression, test_mu_dtype_controls_moment_dtype",
        NO_MU_DTYPE,
        "test_mixed_pytree|test_mu_dtype",
        *MU_DTYPE,
    ),
    LeftOut(
        "contrib._muon_test MuonTest.test_complex_mixed_target",
        "all",
        NO_COMPLEX,
        "",
        *COMPLEX64,
    ),
    LeftOut(
        "contrib._muon_test MuonTest.test_dim_nums_combinations",
        "all",
        NO_MU,
        "",
        TypeError,
        "tuple indices must be integers",
    ),
    LeftOut(
        "contrib._sam_test SAMTest.test_optimization",
        "opaque_mode=False, without `replay=True`",
        TWICE,
        "opaque_mode=False",
        *OLD_STATE,
    ),
    LeftOut(
        "contrib._schedule_free_test ScheduleFreeTest.test_explicit_dtype",
        "complex64 parameters",
        NO_COMPLEX,
        "params_dtype='complex64', state_dtype='complex64'",
        *COMPLEX64,
    ),
    LeftOut(
        "contrib._schedule_free_test ScheduleFreeTest.test_explicit_dtype",
        "complex64 parameters with a real state",
        "optax skips it for every optimizer",
        "params_dtype='complex64', state_dtype=(?!'complex64')",
        unittest.SkipTest,
        "Complex params with non-complex state",
    ),
    LeftOut(
        "contrib._schedule_free_test ScheduleFreeTest.test_schedule_free_adamw",
        "atol=1e-6 with 8-bit moments; 5e-3 holds",
        "moments are rounded to 8 bits",
        "",
        variants=("8bit",),
        atol=5e-3,
    ),
    LeftOut(
        "contrib._complex_valued_test ComplexValuedTest.test_split_real_and_imaginary_adam",
        "rtol=1e-6 with 8-bit moments",
        "moments are rounded at random, each leaf by bits of its own",
        "",
        AssertionError,
        "Not equal to tolerance rtol=1e-06",
        ("8bit",),
    ),
    LeftOut(
        "transforms._accumulation_test AccumulationTest.test_ema_debias",
        "reads `state.ema`, after its updates",
        NO_MU,
        "",
        AttributeError,
        "has no attribute 'ema'",
    ),
    LeftOut(
        "transforms._accumulation_test AccumulationTest.test_multi_steps",
        "without `replay=True`",
        TWICE,
        r"test_multi_steps(_every|_scan|_skip|$)",
        *OLD_STATE,
    ),
    LeftOut(
        "transforms._accumulation_test AccumulationTest.test_multi_steps_mixed_precision",
        "mu_dtype",
        NO_MU_DTYPE,
        "mu_dtype",
        *MU_DTYPE,
    ),
    LeftOut(
        "transforms._combining_test PartitionTest.test_labels_mismatch",
        "with a paged trace",
        NO_DECAY_OF_1,
        "",
        *DECAY_OF_1,
        paged="trace",
    ),
    LeftOut(
        "transforms._combining_test ExtraArgsTest.test_extra_args",
        "all",
        "integer parameters",
        "",
        *INT32,
    ),
    LeftOut(
        "transforms._masking_test MaskedTest.test_masked_state_structure",
        "reads `state.trace`",
        NO_MU,
        "",
        AttributeError,
        "has no attribute 'trace'",
    ),
    LeftOut(
        "tree_utils._state_utils_test StateUtilsTest",
        "test_dict_based_optimizers, test_inject_hparams",
        NO_MU,
        "test_dict_based_optimizers|test_inject_hparams",
        AttributeError,
        "has no attribute 'mu'",
    ),
    LeftOut(
        "tree_utils._state_utils_test StateUtilsTest",
        "test_adam, test_map_non_params_to_none, test_tree_get, test_tree_get_all_with_path,"
        " test_tree_set",
        "look for a `ScaleByAdamState`; ours is a `ScaleByPagedAdam8bitState`",
        "test_adam|test_map_non_params_to_none|test_tree_[gs]et",
        (AssertionError, KeyError),
        "ScaleByPagedAdam8bitState|None != Array",
    ),
    LeftOut(
        "tree_utils._state_utils_test StateUtilsTest.test_map_params_to_none",
        "all",
        "looks for a `ScaleByRssState`; ours is a `ScaleByPagedRss8bitState`",
        "",
        TypeError,
        "unsupported operand",
    ),
)
