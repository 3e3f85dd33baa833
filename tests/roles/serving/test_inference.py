"""InferenceSession takes the place of onnxruntime's: each argument and method means the same, or is refused."""

import inspect
import threading
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import small_models
from onnx import TensorProto, helper
from onnx_models import floats

from securemtk import Config, InferenceSession, InputError, UnsupportedError
from securemtk.serving import onnxruntime_options
from securemtk.serving.onnxruntime_options import ProviderWarning

CPU = ["CPUExecutionProvider"]


def described() -> bytes:
    """Return a model with two outputs, an input that has a default, and all that a file says of itself."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["z"])],
        "the graph",
        [value("x", TensorProto.FLOAT, ["n", 3]), value("w", TensorProto.FLOAT, [3])],
        [value("y", TensorProto.FLOAT, ["n", 3]), value("z", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor("w", TensorProto.FLOAT, [3], [1, -2, 3])],
        doc_string="what the graph is",
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)], producer_name="us")
    model.domain, model.doc_string, model.model_version = "org.example", "what the model is", 7
    helper.set_model_props(model, {"author": "ann", "licence": "none"})
    return model.SerializeToString()


def quiet() -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.log_severity_level = 4
    return made


@pytest.fixture(scope="module")
def theirs():
    return onnxruntime.InferenceSession(described(), quiet(), CPU)


@pytest.fixture(scope="module")
def open_session():
    """One session for all tests that leave it alive, made as programs make onnxruntime's."""
    settings = quiet()
    settings.intra_op_num_threads = 1
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with InferenceSession(described(), settings, CPU, [{}], enable_fallback=0, disabled_optimizers=["x"]) as session:
        yield session


X = np.array([[0.5, 1, -4], [-2, 3, 0]], dtype=np.float32)


# --- the whole of it ------------------------------------------------------------------------------------------------


PUBLIC = [name for name in dir(onnxruntime.InferenceSession) if not name.startswith("_")]
CALLS = {
    "run_async": ([], {"x": X}, lambda *_: None, None),
    "run_with_iobinding": (None,),
    "run_with_ort_values": (["y"], {}),
    "run_with_ortvaluevector": (None, [], [], [], [], []),
    "create_ortvalue_from_shape_and_type": ([1], np.float32, "cpu"),
    "set_ep_dynamic_options": ({"a": "b"},),
    "set_tuning_results": ([],),
    "run": (["y"], {}),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_of_onnxruntimes_is_here_with_its_parameters(name):
    theirs, ours = getattr(onnxruntime.InferenceSession, name), getattr(InferenceSession, name)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    assert ours.__doc__


def test_the_constructor_takes_the_same_arguments_in_the_same_order():
    parameters = list(inspect.signature(onnxruntime.InferenceSession).parameters)
    assert list(inspect.signature(InferenceSession).parameters)[: len(parameters) - 1] == parameters[:-1]


@pytest.mark.parametrize("name", PUBLIC)
def test_each_method_answers_or_is_refused_by_one_sentence(open_session, name):
    said = "must"
    try:
        getattr(open_session, name)(*CALLS.get(name, ()))
    except (UnsupportedError, InputError) as error:
        said = str(error)
    assert "must" in said
    assert "\n" not in said


SAME = [
    *("get_providers", "get_provider_options", "end_profiling", "get_profiling_start_time_ns", "get_tuning_results"),
    *("disable_fallback", "enable_fallback", "set_providers", "release_captured_graph"),
]


@pytest.mark.parametrize("name", SAME)
def test_these_answer_as_onnxruntime_does(open_session, name):
    theirs = onnxruntime.InferenceSession(described(), quiet(), CPU)
    assert getattr(open_session, name)() == getattr(theirs, name)()


def test_arguments_are_described_as_onnxruntime_describes_them(open_session, theirs):
    for name in ("get_inputs", "get_outputs", "get_overridable_initializers"):
        ours = [(x.name, x.type, len(x.shape)) for x in getattr(open_session, name)()]
        assert ours == [(x.name, x.type, len(x.shape)) for x in getattr(theirs, name)()]
    assert [x.shape for x in open_session.get_overridable_initializers()] == [[3]]


FIELDS = [name for name in dir(onnxruntime.ModelMetadata) if not name.startswith("_")]


@pytest.mark.parametrize("name", FIELDS)
def test_the_file_says_of_itself_what_onnxruntime_reads(open_session, theirs, name):
    found = getattr(theirs.get_modelmeta(), name)
    assert getattr(open_session.get_modelmeta(), name) == found
    assert found  # the file says something of each


def test_a_bundle_says_what_its_model_says(tmp_path):
    small_models.make_bundle(tmp_path)
    found = onnxruntime_options.metadata((tmp_path / "bundle" / "cloud.onnx").read_bytes())
    with InferenceSession(tmp_path / "bundle", key_files=tmp_path / "keys") as session:
        assert session.get_modelmeta() == found


def test_where_arrays_lie_is_said_as_onnxruntime_says_it(open_session, theirs):
    for name in ("get_input_memory_infos", "get_output_memory_infos"):
        ours, expected = getattr(open_session, name)(), getattr(theirs, name)()
        kinds = ("name", "device_id", "mem_type")
        assert [[getattr(x, k) for k in kinds] for x in ours] == [[getattr(x, k) for k in kinds] for x in expected]


# --- running --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, [], ["z"], ["z", "y"], ["y", "y"], ("y",)])
def test_outputs_are_those_that_onnxruntime_gives(open_session, theirs, names):
    ours, expected = open_session.run(names, {"x": X}), theirs.run(names, {"x": X})
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_a_feed_may_be_nested_lists_or_an_ort_value(open_session, theirs):
    expected = theirs.run(None, {"x": X.tolist()})
    for feed in (X.tolist(), onnxruntime.OrtValue.ortvalue_from_numpy(X)):
        for one, other in zip(open_session.run(None, {"x": feed}), expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-3)


def test_ort_values_come_back_as_ort_values(open_session, theirs):
    feed = {"x": onnxruntime.OrtValue.ortvalue_from_numpy(X)}
    ours, expected = open_session.run_with_ort_values(["z"], feed), theirs.run_with_ort_values(["z"], feed)
    assert isinstance(ours[0], onnxruntime.OrtValue)
    assert (ours[0].data_type(), ours[0].shape()) == (expected[0].data_type(), expected[0].shape())
    np.testing.assert_allclose(ours[0].numpy(), expected[0].numpy(), atol=1e-3)


def test_run_options_that_only_log_are_taken_and_an_ended_run_does_not_begin(open_session):
    quiet = onnxruntime.RunOptions()
    quiet.log_severity_level, quiet.logid, quiet.only_execute_path_to_fetches = 4, "mine", True
    assert len(open_session.run(None, {"x": X}, quiet)) == 2
    assert len(open_session.run(None, {"x": X}, run_options=quiet)) == 2
    quiet.terminate = True
    with pytest.raises(InputError, match="terminate must be False"):
        open_session.run(None, {"x": X}, quiet)
    with pytest.raises(TypeError, match="RunOptions or None; got dict"):
        open_session.run(None, {"x": X}, {"terminate": False})


def called_back(session, names, feed) -> tuple:
    """Run in the background; return what the callback was told, and the thread it was told in."""
    told, done = [], threading.Event()

    def hear(outputs, user_data, error):
        told.append((outputs, user_data, error, threading.current_thread()))
        done.set()

    session.run_async(names, feed, hear, "mine")
    assert done.wait(60)
    return told[0]


def test_run_async_calls_back_with_what_onnxruntime_would_give(open_session, theirs):
    outputs, user_data, error, thread = called_back(open_session, [], {"x": X})
    expected, their_data, their_error, _ = called_back(theirs, [], {"x": X})
    for one, other in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)
    assert (user_data, error) == (their_data, their_error) == ("mine", "")
    assert thread is not threading.main_thread()


def test_run_async_tells_the_callback_what_went_wrong_and_the_session_lives_on(open_session, theirs):
    outputs, _, error, _ = called_back(open_session, ["y"], {"x": np.ones((2, 5), dtype=np.float32)})
    expected, _, their_error, _ = called_back(theirs, ["y"], {"x": np.ones((2, 5), dtype=np.float32)})
    assert outputs == expected == []
    assert "got shape (2, 5)" in error
    assert their_error
    assert len(open_session.run(None, {"x": X})) == 2


def test_close_waits_for_what_runs_and_leaves_no_thread():
    told, before = [], set(threading.enumerate())
    session = InferenceSession(described())
    for number in range(3):
        session.run_async(["y"], {"x": X}, lambda outputs, n, error: told.append((n, error)), number)
    session.close()
    assert told == [(0, ""), (1, ""), (2, "")]
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("securemtk")]


def test_a_feed_of_run_async_may_be_overwritten_at_once(open_session):
    x, done, told = X.copy(), threading.Event(), []
    open_session.run_async(["y"], {"x": x}, lambda outputs, *_: (told.append(outputs), done.set()), None)
    x[:] = 100
    assert done.wait(60)
    np.testing.assert_allclose(told[0][0], X + np.array([1, -2, 3]), atol=1e-3)


# --- what is said when it is made -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "providers", [None, [], CPU, CPU * 2, [("CPUExecutionProvider", {"use_arena": "0"})], tuple(CPU)]
)
def test_the_cpu_is_taken(providers):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        onnxruntime_options.check_providers(providers, None)


@pytest.mark.parametrize(
    "providers",
    [
        ["CUDAExecutionProvider", "CPUExecutionProvider"],
        [("CUDAExecutionProvider", {"device_id": 0}), "CPUExecutionProvider"],
        ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
    ],
)
def test_a_provider_that_is_preferred_to_the_cpu_is_named_in_a_warning(providers):
    with pytest.warns(ProviderWarning, match="CUDAExecutionProvider before CPUExecutionProvider is not used"):
        onnxruntime_options.check_providers(providers, None)


@pytest.mark.parametrize("providers", [["CUDAExecutionProvider"], ["AzureExecutionProvider"], ["Nonsense"]])
def test_providers_without_the_cpu_are_refused_and_nothing_is_started(providers):
    with pytest.raises(UnsupportedError, match="the parties compute on the CPU; got"):
        InferenceSession(described(), providers=providers)


def test_set_providers_says_the_same(open_session):
    open_session.set_providers(CPU)
    with pytest.raises(UnsupportedError, match="the parties compute on the CPU"):
        open_session.set_providers(["CUDAExecutionProvider"])


@pytest.mark.parametrize(
    ("providers", "more"),
    [
        ("CPUExecutionProvider", None),
        ([3], None),
        ([("CPUExecutionProvider", "use_arena")], None),
        (3, None),
        (None, [{}]),
        (CPU, [{}, {}]),
        (CPU, {"use_arena": 0}),
        ([("CPUExecutionProvider", {"use_arena": "0"})], [{}]),
    ],
)
def test_what_is_no_list_of_providers_is_refused(providers, more):
    with pytest.raises(InputError, match="must be"):
        onnxruntime_options.check_providers(providers, more)


def test_a_session_says_which_line_of_the_program_names_the_provider():
    with pytest.warns(ProviderWarning) as said:
        InferenceSession(described(), None, ["CUDAExecutionProvider", "CPUExecutionProvider"]).close()
    assert [warning.filename for warning in said] == [__file__]


def with_option(name: str, value: object) -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("name", "value"),
    [("enable_profiling", True), ("optimized_model_filepath", "m.onnx"), ("use_deterministic_compute", True)],
)
def test_session_options_that_cannot_be_honoured_are_refused(name, value):
    with pytest.raises(UnsupportedError, match=rf"sess_options\.{name} must be .*: .*; got"):
        InferenceSession(described(), sess_options=with_option(name, value))


@pytest.mark.parametrize("name", onnxruntime_options.ENTRIES)
def test_entries_of_session_options_that_cannot_be_honoured_are_refused(name):
    made = onnxruntime.SessionOptions()
    made.add_session_config_entry(name, "1" if name != "session.load_model_format" else "ORT")
    with pytest.raises(UnsupportedError, match=name):
        onnxruntime_options.check_session_options(made, with_providers=False)


def test_a_provider_in_the_session_options_counts_where_none_is_named_besides():
    made = onnxruntime.SessionOptions()
    devices = [x for x in onnxruntime.get_ep_devices() if x.ep_name == "CPUExecutionProvider"]
    made.add_provider_for_devices(devices, {})
    with pytest.raises(UnsupportedError, match="no providers of its own"):
        onnxruntime_options.check_session_options(made, with_providers=False)
    assert onnxruntime_options.check_session_options(made, with_providers=True) is made


def test_every_field_of_session_options_was_thought_of():
    fresh = onnxruntime.SessionOptions()
    fields = {name for name in dir(fresh) if not name.startswith("_") and not callable(getattr(fresh, name))}
    assert fields == {*onnxruntime_options.HARMLESS, *onnxruntime_options.BOUND}
    run = onnxruntime.RunOptions()
    fields = {name for name in dir(run) if not name.startswith("_") and not callable(getattr(run, name))}
    assert fields == {*onnxruntime_options.RUN_HARMLESS, "terminate"}


def test_a_field_of_a_newer_onnxruntime_is_refused_where_it_is_set(monkeypatch):
    monkeypatch.setattr(onnxruntime_options, "HARMLESS", tuple(x for x in onnxruntime_options.HARMLESS if x != "logid"))
    onnxruntime_options.check_session_options(onnxruntime.SessionOptions(), with_providers=False)
    with pytest.raises(UnsupportedError, match=r"sess_options\.logid must be left as it is"):
        onnxruntime_options.check_session_options(with_option("logid", "mine"), with_providers=False)


def test_session_options_come_back(open_session):
    made = onnxruntime.SessionOptions()
    assert onnxruntime_options.check_session_options(made, with_providers=False) is made
    assert open_session.get_session_options().log_severity_level == 4
    with pytest.raises(TypeError, match="SessionOptions or None; got dict"):
        InferenceSession(described(), {"log_severity_level": 3})


def test_a_keyword_that_nobody_knows_is_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'provider'"):
        InferenceSession(described(), provider=CPU)
    with pytest.raises(UnsupportedError, match="read_config_from_model must be 0"):
        InferenceSession(described(), read_config_from_model=1)


def test_a_program_written_for_onnxruntime_runs_with_its_import_changed(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(small_models.mlp())
    onnx.checker.check_model(str(path))
    program = """
sess_options = ort.SessionOptions()
sess_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
sess_options.intra_op_num_threads = 1
session = Session(str(path), sess_options=sess_options, providers=["CPUExecutionProvider"])
print(session.get_modelmeta().producer_name, session.get_providers())
inputs = {i.name: x for i in session.get_inputs()}
names = [o.name for o in session.get_outputs()]
first = session.run(names, inputs, ort.RunOptions())
second = session.run([], inputs)
"""
    x = floats(3, 8)
    answers = []
    for session_class in (onnxruntime.InferenceSession, InferenceSession):
        variables = {"ort": onnxruntime, "Session": session_class, "path": path, "x": x}
        exec(program, variables)  # noqa: S102
        answers.append(variables)
    answers[1]["session"].close()
    for name in ("first", "second"):
        np.testing.assert_allclose(answers[0][name][0], answers[1][name][0], atol=2e-3)


def test_our_own_arguments_stand_beside_theirs():
    with InferenceSession(described(), None, CPU, config=Config(ahead=0), protocol="crypten", public=()) as session:
        np.testing.assert_allclose(session.run(["y"], {"x": X})[0], X + np.array([1, -2, 3]), atol=1e-3)
