/* A property that is read in C as long as nothing stands in for its value, and by a function of Python otherwise.

   Chainer reads the arrays of its graph through properties (nodes.py), some ten times a function. Mostly the array is
   there, and nobody has to be told: then no code of Python runs here. Every other case, every error included, is left to
   the functions of Python that the property is made of. */
#include "../swap/devices/ram/allocator.h"

static PyObject *foreign_name, *node_name; /* attributes of Variable */

typedef struct {
    PyObject_HEAD
    PyObject *name;    /* of the value in the instance's __dict__ */
    PyObject *asks;    /* with this name in there, `get` is to be asked; NULL for never */
    PyObject *stand_in; /* the type of values that `get` is to be asked of */
    PyObject *get, *set;
    PyObject *doc;
} Property;

/* Borrowed: the value of a name in a dictionary, NULL without or with an error. */
static PyObject *find(PyObject *dict, PyObject *name)
{
    return dict ? PyDict_GetItemWithError(dict, name) : NULL;
}

/* New: an instance's __dict__, NULL without an error where there is none. */
static PyObject *dict_of(PyObject *self)
{
    PyObject *dict = PyObject_GenericGetDict(self, NULL);
    if (!dict)
        PyErr_Clear();
    return dict;
}

static PyObject *call(PyObject *function, PyObject *instance)
{
    return PyObject_CallFunctionObjArgs(function, instance, NULL);
}

static PyObject *property_get(PyObject *self, PyObject *instance, PyObject *type)
{
    (void)type;
    Property *of = (Property *)self;
    if (!instance)
        return Py_NewRef(self);
    PyObject *dict = dict_of(instance), *value = NULL;
    if (dict && !(of->asks && find(dict, of->asks))) {
        value = find(dict, of->name);
        if (value && (PyObject *)Py_TYPE(value) == of->stand_in)
            value = NULL;
        Py_XINCREF(value);
    }
    Py_XDECREF(dict);
    if (value)
        return value;
    PyErr_Clear();
    return call(of->get, instance);
}

/* The same of Variable.raw_array: the first item of `name`, unless `asks` is in the node's __dict__. A variable's own
   __dict__ is not asked for: Python would have to make it. */
static PyObject *raw_array_get(PyObject *self, PyObject *instance, PyObject *type)
{
    (void)type;
    Property *of = (Property *)self;
    if (!instance)
        return Py_NewRef(self);
    PyObject *foreign = PyObject_GetAttr(instance, foreign_name), *node = NULL, *dict = NULL, *data = NULL, *value = NULL;
    if (foreign == Py_False && (node = PyObject_GetAttr(instance, node_name)) && (dict = dict_of(node)) &&
        !find(dict, of->asks) && !PyErr_Occurred() && (data = PyObject_GetAttr(instance, of->name)) &&
        PyList_CheckExact(data) && PyList_Size(data) > 0) /* a subclass may hold a stand-in */
        value = Py_XNewRef(PyList_GetItem(data, 0));
    Py_XDECREF(foreign);
    Py_XDECREF(node);
    Py_XDECREF(dict);
    Py_XDECREF(data);
    if (value)
        return value;
    PyErr_Clear();
    return call(of->get, instance);
}

static int property_set(PyObject *self, PyObject *instance, PyObject *value)
{
    Property *of = (Property *)self;
    if (!value) {
        PyErr_Format(PyExc_AttributeError, "%U cannot be deleted", of->name);
        return -1;
    }
    if (!of->set) {
        PyErr_Format(PyExc_AttributeError, "%U cannot be set", of->name);
        return -1;
    }
    PyObject *dict = dict_of(instance);
    if (dict) {
        PyObject *old = find(dict, of->name);
        if ((!old && !PyErr_Occurred()) || old == Py_None) { /* nobody has seen another value */
            int failed = PyDict_SetItem(dict, of->name, value);
            Py_DECREF(dict);
            return failed;
        }
        Py_DECREF(dict);
        PyErr_Clear();
    }
    PyObject *done = PyObject_CallFunctionObjArgs(of->set, instance, value, NULL);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

static PyObject *property_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"name", "asks", "stand_in", "get", "set", "doc", NULL};
    PyObject *name, *asks, *stand_in, *get, *set, *doc = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "UOOOO|O", names, &name, &asks, &stand_in, &get, &set, &doc))
        return NULL;
    Property *self = (Property *)PyType_GenericAlloc(type, 0);
    if (!self)
        return NULL;
    Py_INCREF(name);
    PyUnicode_InternInPlace(&name);
    self->name = name;
    if (asks != Py_None) {
        Py_INCREF(asks);
        PyUnicode_InternInPlace(&asks);
        self->asks = asks;
    }
    self->stand_in = Py_NewRef(stand_in);
    self->get = Py_NewRef(get);
    self->set = set == Py_None ? NULL : Py_NewRef(set);
    self->doc = Py_NewRef(doc);
    return (PyObject *)self;
}

static int property_traverse(PyObject *self, visitproc visit, void *arg)
{
    Property *of = (Property *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(of->stand_in);
    Py_VISIT(of->get);
    Py_VISIT(of->set);
    Py_VISIT(of->doc);
    return 0;
}

static int property_clear(PyObject *self)
{
    Property *of = (Property *)self;
    Py_CLEAR(of->name);
    Py_CLEAR(of->asks);
    Py_CLEAR(of->stand_in);
    Py_CLEAR(of->get);
    Py_CLEAR(of->set);
    Py_CLEAR(of->doc);
    return 0;
}

static void property_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    property_clear(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *property_doc(PyObject *self, void *unused)
{
    (void)unused;
    return Py_NewRef(((Property *)self)->doc);
}

static PyGetSetDef of_property[] = {{"__doc__", property_doc, NULL, NULL, NULL}, {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot property_slots[] = {
    {Py_tp_new, property_new},
    {Py_tp_descr_get, property_get},
    {Py_tp_descr_set, property_set},
    {Py_tp_traverse, property_traverse},
    {Py_tp_clear, property_clear},
    {Py_tp_dealloc, property_free},
    {Py_tp_getset, of_property},
    {0, NULL},
};

static PyType_Spec property_spec = {
    "chainer_ooc.swap.devices.ram._allocator.FastProperty", sizeof(Property), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE, property_slots,
};

static PyType_Slot raw_array_slots[] = {{Py_tp_descr_get, raw_array_get}, {0, NULL}};

static PyType_Spec raw_array_spec = {
    "chainer_ooc.swap.devices.ram._allocator.RawArray", sizeof(Property), 0,
    Py_TPFLAGS_DEFAULT, raw_array_slots, /* the rest, garbage collection too, is inherited */
};

int add_fast_property(PyObject *module)
{
    foreign_name = PyUnicode_InternFromString("_has_chainerx_array");
    node_name = PyUnicode_InternFromString("_node");
    PyObject *property = foreign_name && node_name ? PyType_FromSpec(&property_spec) : NULL;
    PyObject *raw_array = property ? PyType_FromSpecWithBases(&raw_array_spec, property) : NULL;
    int failed = !raw_array || PyModule_AddObjectRef(module, "FastProperty", property) ||
                 PyModule_AddObjectRef(module, "RawArray", raw_array);
    Py_XDECREF(property);
    Py_XDECREF(raw_array);
    return failed ? -1 : 0;
}
