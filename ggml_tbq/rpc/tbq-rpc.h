// SPDX-License-Identifier: MIT
// What an RPC client and an RPC server of this project ask each other in addition to upstream's protocol; compiled into
// ggml-rpc.
//
// Client                              Server
// HELLO (upstream)                    its protocol version
// TBQ_HELLO, tbq_rpc_hello            tbq_rpc_hello; upstream's server closes the connection, because it does not know the
//                                     command
// TBQ_SUPPORTS_OP, an operation       whether the device of the server supports it
//
// After TBQ_HELLO the server sends a heartbeat, the size TBQ_RPC_BUSY in front of no data, every TBQ_RPC_HEARTBEAT
// seconds while it works on a command.  So a client tells a server that computes for minutes from one that hangs.
#pragma once

#include "ggml.h"
#include "transport.h"

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>

enum tbq_rpc_command : uint8_t { // far above upstream's
    TBQ_RPC_HELLO       = 0xE0,
    TBQ_RPC_SUPPORTS_OP = 0xE1,
};

enum {
    // Counts changes of what a graph with tbq types means: sources and parameters of the operations (tbq-ggml.h)
    TBQ_RPC_VERSION   = 1,
    TBQ_RPC_HEARTBEAT = 5,  // seconds
    TBQ_RPC_TIMEOUT   = 20, // seconds without a heartbeat or an answer, after which a server counts as lost
};

// --- the client's side

// Asks a server for its versions.  False if it is not one of this project, or of other versions; the log says so in a
// line that names the endpoint.
bool tbq_rpc_greet(socket_t & socket, const char * endpoint);

// The size of an answer; heartbeats in front of it are passed over.
bool tbq_rpc_recv_size(socket_t & socket, uint64_t & size);

// Bytes that a socket has received and nobody has read; -1 where that is not known.
int tbq_rpc_waiting(int socket);

// Whether send() gave up only because the server is busy: it has sent heartbeats since `waiting` bytes were there.
// Updates `waiting`.
bool tbq_rpc_is_busy(int socket, int & waiting);

// The answers of a device to "is this operation supported?".
class tbq_rpc_answers {
public:
    // ask: puts the question to the server, and sets its argument if there is an answer to keep.  It is called once for
    // operations that no backend tells apart: from a size of 256 on, all but the first dimension count by the powers of
    // two that divide them, so that a growing cache does not ask again for each batch.
    bool supports(const ggml_tensor * op, const std::function<bool(bool & answered)> & ask);

private:
    std::mutex                            mutex_;
    std::unordered_map<std::string, bool> answers_;
};

// --- the server's side

// Answers TBQ_RPC_HELLO, whose command byte has been read.  False if the client is of other versions: the connection
// ends.
bool tbq_rpc_welcome(socket_t & socket);

// Whether a tensor that came over the network has rows as the kernels of its type read them.  True for types of
// upstream, about which upstream decides.
bool tbq_rpc_valid_tensor(uint32_t type, const uint32_t * ne, const uint32_t * nb);

// Whether the sources of an operation with tbq types fit it, as far as its kernels rely on that.  What they read of
// other operations, upstream decides.
bool tbq_rpc_valid_op(const ggml_tensor * op);

// A thread that sends heartbeats while the server works on a command.
class tbq_rpc_heartbeat {
public:
    explicit tbq_rpc_heartbeat(socket_t & socket) : socket_(socket) {}
    ~tbq_rpc_heartbeat();

    void start(); // the client knows heartbeats
    void work();  // a command begins
    void rest();  // the server waits for the next command

private:
    void run();

    socket_t &              socket_;
    std::thread             thread_;
    std::mutex              mutex_;
    std::condition_variable changed_;
    bool                    working_ = false;
    bool                    ended_   = false;
};
