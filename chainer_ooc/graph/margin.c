/* The bytes of inputs that functions of the graph may still get before memory has to be looked at again.

   While all fits, every function's test whether memory is plenty (hooks.py) ends here, with no code of Python. The margin
   is void where the levels of allocations are: once settings, modes or observers have changed, or memory has been short. */
#include "../swap/devices/ram/allocator.h"

static PyObject *data_name, *nbytes_name; /* attributes of Variable and of ndarray */
static PyTypeObject *variable_type, *array_type;
static PyObject *of_settings; /* those that it holds under */
static Py_ssize_t margin;
static long functions; /* that it covers at most */
static unsigned of_epoch;

/* Returns the bytes of one input; -1 if it is neither an ndarray nor a variable of one, or with an error. */
static Py_ssize_t bytes_of(PyObject *x)
{
    PyObject *data = NULL, *array = x, *nbytes;
    Py_ssize_t result = -1;
    if (PyType_IsSubtype(Py_TYPE(x), variable_type)) {
        data = PyObject_GetAttr(x, data_name);
        array = data && PyList_Check(data) && PyList_Size(data) > 0 ? PyList_GetItem(data, 0) : NULL;
    }
    if (array && Py_TYPE(array) == array_type && (nbytes = PyObject_GetAttr(array, nbytes_name))) {
        result = PyLong_AsSsize_t(nbytes);
        Py_DECREF(nbytes);
    }
    Py_XDECREF(data);
    return result;
}

static PyObject *covers(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "covers(inputs, settings) takes 2 arguments, not %zd", count);
    PyObject *inputs = args[0];
    if (!variable_type || args[1] != of_settings || of_epoch != allocation_epoch() || functions <= 0 || thread_asks())
        Py_RETURN_FALSE;
    int is_list = PyList_Check(inputs);
    if (!is_list && !PyTuple_Check(inputs))
        Py_RETURN_FALSE;
    Py_ssize_t total = 0;
    /* A subclass's property may run Python: the list may shrink, and its items may die. */
    for (Py_ssize_t i = 0; i < (is_list ? PyList_Size(inputs) : PyTuple_Size(inputs)); i++) {
        PyObject *x = Py_NewRef(is_list ? PyList_GetItem(inputs, i) : PyTuple_GetItem(inputs, i));
        Py_ssize_t nbytes = bytes_of(x);
        Py_DECREF(x);
        if (nbytes < 0 && PyErr_Occurred())
            return NULL;
        if (nbytes < 0 || nbytes > margin - total)
            Py_RETURN_FALSE;
        total += nbytes;
    }
    if (total == 0)
        Py_RETURN_FALSE;
    margin -= total;
    functions--;
    Py_RETURN_TRUE;
}

static PyObject *set_margin(PyObject *module, PyObject *args)
{
    (void)module;
    Py_ssize_t nbytes;
    long most;
    PyObject *settings;
    if (!PyArg_ParseTuple(args, "nlO:set_margin", &nbytes, &most, &settings))
        return NULL;
    PyObject *old = of_settings;
    of_settings = Py_NewRef(settings);
    margin = nbytes;
    functions = most;
    of_epoch = allocation_epoch();
    Py_XDECREF(old);
    Py_RETURN_NONE;
}

static PyObject *count_arrays_of(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *variable, *array;
    if (!PyArg_ParseTuple(args, "O!O!:count_arrays_of", &PyType_Type, &variable, &PyType_Type, &array))
        return NULL;
    variable_type = (PyTypeObject *)Py_NewRef(variable); /* for good */
    array_type = (PyTypeObject *)Py_NewRef(array);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"count_arrays_of", count_arrays_of, METH_VARARGS,
     "count_arrays_of(variable, array): tell the types of variables and of the arrays that margins are for."},
    {"set_margin", set_margin, METH_VARARGS,
     "set_margin(nbytes, functions, settings): cover so many functions, with inputs of so many bytes in all, as long as "
     "these settings are in force and nothing calls ask_again()."},
    {"covers", (PyCFunction)(void (*)(void))covers, METH_FASTCALL,
     "covers(inputs, settings): return whether the margin covers a function, and take its inputs' bytes off."},
    {NULL, NULL, 0, NULL},
};

int add_margin(PyObject *module)
{
    data_name = PyUnicode_InternFromString("_data");
    nbytes_name = PyUnicode_InternFromString("nbytes");
    return data_name && nbytes_name ? PyModule_AddFunctions(module, methods) : -1;
}
